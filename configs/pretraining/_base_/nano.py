"""For small data and CPUs: 64x64, 20 epochs, mild augmentation."""

_base_ = "./in1k_300e.py"
small = dict(num_workers=2, batch_size=32, pin_memory=False)
train_dataloader = dict(
    **small,
    dataset=dict(
        root="data/train",
        num_classes=10,
        transform=dict(
            _delete_=True,
            input_size=64,
            is_training=True,
            scale=(0.4, 1.0),
            interpolation="bicubic",
            color_jitter=0.2,
        ),
    ),
)
val_dataloader = dict(
    **small,
    dataset=dict(
        root="data/val",
        num_classes=10,
        transform=dict(input_size=64, crop_pct=1.0),
    ),
)
model = dict(num_classes=10, img_size=64, mixup=None)
total_batch_size = 32
param_scheduler = [
    dict(type="LinearLR", start_factor=0.05, begin=0, end=2, convert_to_iter_based=True),
    dict(type="CosineAnnealingLR", eta_min=1e-5, begin=2, end=20, convert_to_iter_based=True),
]
train_cfg = dict(max_epochs=20)
default_hooks = dict(logger=dict(interval=10))
