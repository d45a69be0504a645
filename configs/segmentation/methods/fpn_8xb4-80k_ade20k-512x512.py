"""Semantic FPN, ADE20K, 80k as Twins in MMSegmentation; any backbone by ``model.backbone.type``."""

_base_ = [
    "mmseg::_base_/models/fpn_r50.py",
    "../_base_/datasets/ade20k.py",
    "../_base_/schedules/schedule_80k.py",
    "../_base_/default_runtime.py",
]
model = dict(
    pretrained=None,
    data_preprocessor=dict(size=(512, 512)),
    backbone=dict(
        _delete_=True,
        type="swin_tiny",
        init="ms_in1k",
        out_indices=(0, 1, 2, 3),
        drop_path_rate=0.2,
        norm="SyncBN",
    ),
    neck=dict(in_channels=[96, 192, 384, 768]),
    decode_head=dict(num_classes=150),
)
train_dataloader = dict(batch_size=4)
optim_wrapper = dict(optimizer=dict(lr=1e-4, weight_decay=1e-4))
param_scheduler = [dict(type="PolyLR", eta_min=1e-4, power=0.9, begin=0, end=80000, by_epoch=False)]
