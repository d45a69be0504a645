"""A folder per class, Swin's augmentation, 224x224; validation crops the centre of 256x256."""

train_dataloader = dict(
    batch_size=128,
    num_workers=8,
    persistent_workers=True,
    pin_memory=True,
    drop_last=True,
    collate_fn=dict(type="default_collate"),
    sampler=dict(type="ResumableSampler", shuffle=True),
    dataset=dict(
        type="ImageDataset",
        root="data/imagenet/train",
        num_classes=1000,
        transform=dict(
            input_size=224,
            is_training=True,
            interpolation="bicubic",
            auto_augment="rand-m9-mstd0.5-inc1",
            color_jitter=0.4,
            re_prob=0.25,
            re_mode="pixel",
        ),
    ),
)
val_dataloader = dict(
    batch_size=128,
    num_workers=8,
    persistent_workers=True,
    pin_memory=True,
    collate_fn=dict(type="default_collate"),
    sampler=dict(type="DefaultSampler", shuffle=False),
    dataset=dict(
        type="ImageDataset",
        root="data/imagenet/val",
        num_classes=1000,
        transform=dict(input_size=224, interpolation="bicubic", crop_pct=224 / 256),
    ),
)
model = dict(
    type="ImageClassifier",
    num_classes=1000,
    mixup=dict(mixup_alpha=0.8, cutmix_alpha=1.0),
    label_smoothing=0.1,
)
