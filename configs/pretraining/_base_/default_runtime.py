"""Settings of every run: text and TensorBoard logs, checkpoints, a stop at non-finite losses."""

custom_imports = dict(
    imports=[
        "dense.pretraining",
        "dense.openmmlab.hooks",
        "dense.openmmlab.optim",
        "dense.openmmlab.resuming",
        "dense.openmmlab.runner",
        "dense.openmmlab.schedule",
    ]
)
runner_type = "DenseRunner"
default_scope = "mmengine"
env_cfg = dict(
    cudnn_benchmark=True,
    mp_cfg=dict(mp_start_method="fork", opencv_num_threads=0),
    dist_cfg=dict(backend="nccl"),
)
default_hooks = dict(
    timer=dict(type="IterTimerHook"),
    logger=dict(type="LoggerHook", interval=50),
    param_scheduler=dict(type="ParamSchedulerHook"),
    checkpoint=dict(
        type="CheckpointHook", interval=1, max_keep_ckpts=3, save_best="top1", rule="greater"
    ),
    sampler_seed=dict(type="DistSamplerSeedHook"),
)
custom_hooks = [
    dict(type="SeedEveryIteration"),
    dict(type="StopOnNonFiniteLoss"),
    dict(type="ProgressBar"),
]
vis_backends = [dict(type="LocalVisBackend"), dict(type="TensorboardVisBackend")]
visualizer = dict(type="Visualizer", vis_backends=vis_backends)
train_cfg = dict(type="ResumableEpochTrainLoop", val_interval=1)
val_cfg = dict(type="ValLoop")
val_evaluator = dict(type="ClassificationMetric")
log_level = "INFO"
load_from = None
resume = False
