"""36 epochs of AdamW in mixed precision, batch 16 (8 GPUs x 2)."""

optim_wrapper = dict(
    type="AmpOptimWrapper",
    optimizer=dict(type="AdamW", lr=1e-4, betas=(0.9, 0.999), weight_decay=0.05),
    # No weight decay on norms (batch norms included) and relative position bias tables.
    constructor="DenseOptimWrapperConstructor",
)
param_scheduler = [
    # Warm-up as in Swin, whose settings the paper adopts.
    dict(type="LinearLR", start_factor=0.001, by_epoch=False, begin=0, end=500),
    dict(type="MultiStepLR", by_epoch=True, begin=0, end=36, milestones=[27, 33], gamma=0.1),
]
train_cfg = dict(type="EpochBasedTrainLoop", max_epochs=36, val_interval=3)
val_cfg = dict(type="ValLoop")
test_cfg = dict(type="TestLoop")
auto_scale_lr = dict(enable=False, base_batch_size=16)
