"""Settings of every run: registered backbones, a runner for CPU and GPU, TensorBoard logs."""

# dense.segmentation registers the backbones for MMDetection too; it needs mmengine only.
custom_imports = dict(
    imports=[
        "dense.segmentation",
        "dense.openmmlab.hooks",
        "dense.openmmlab.runner",
        "dense.openmmlab.tta",
    ]
)
runner_type = "DenseRunner"
default_scope = "mmdet"
default_hooks = dict(
    timer=dict(type="IterTimerHook"),
    logger=dict(type="LoggerHook", interval=50),
    param_scheduler=dict(type="ParamSchedulerHook"),
    checkpoint=dict(
        type="CheckpointHook",
        interval=1,
        max_keep_ckpts=3,
        save_best="coco/bbox_mAP",
        rule="greater",
    ),
    sampler_seed=dict(type="DistSamplerSeedHook"),
    visualization=dict(type="DetVisualizationHook"),
)
custom_hooks = [dict(type="StopOnNonFiniteLoss")]
env_cfg = dict(
    cudnn_benchmark=False,
    mp_cfg=dict(mp_start_method="fork", opencv_num_threads=0),
    dist_cfg=dict(backend="nccl"),
)
vis_backends = [dict(type="LocalVisBackend"), dict(type="TensorboardVisBackend")]
visualizer = dict(type="DetLocalVisualizer", vis_backends=vis_backends)
log_processor = dict(by_epoch=True)
log_level = "INFO"
load_from = None
resume = False
