"""12 epochs of AdamW, batch 16 (8 GPUs x 2), as MMDetection's Swin configs."""

_base_ = "./schedule_3x.py"
optim_wrapper = dict(type="OptimWrapper")
param_scheduler = [
    dict(type="LinearLR", start_factor=0.001, by_epoch=False, begin=0, end=1000),
    dict(type="MultiStepLR", by_epoch=True, begin=0, end=12, milestones=[8, 11], gamma=0.1),
]
train_cfg = dict(max_epochs=12, val_interval=1)
