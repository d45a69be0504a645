"""Settings of every run: registered backbones, a runner for CPU and GPU, TensorBoard logs."""

custom_imports = dict(
    imports=[
        "dense.segmentation",
        "dense.segmentation.dataset",
        "dense.openmmlab.hooks",
        "dense.openmmlab.resuming",
        "dense.openmmlab.runner",
    ]
)
runner_type = "DenseRunner"
default_scope = "mmseg"
env_cfg = dict(
    cudnn_benchmark=True,
    mp_cfg=dict(mp_start_method="fork", opencv_num_threads=0),
    dist_cfg=dict(backend="nccl"),
)
custom_hooks = [dict(type="SeedEveryIteration"), dict(type="StopOnNonFiniteLoss")]
vis_backends = [dict(type="LocalVisBackend"), dict(type="TensorboardVisBackend")]
visualizer = dict(type="SegLocalVisualizer", vis_backends=vis_backends)
log_processor = dict(by_epoch=False)
log_level = "INFO"
load_from = None
resume = False
