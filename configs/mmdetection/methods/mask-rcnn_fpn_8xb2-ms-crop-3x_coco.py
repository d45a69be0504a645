"""Mask R-CNN, COCO, MMDetection's 3x of Swin; ``model.backbone.type`` takes any backbone."""

_base_ = [
    "mmdet::_base_/models/mask-rcnn_r50_fpn.py",
    "../_base_/coco.py",
    "../_base_/schedule_1x.py",
    "../_base_/default_runtime.py",
]
model = dict(
    backbone=dict(
        _delete_=True,
        type="swin_tiny",
        init="ms_in1k",
        out_indices=(0, 1, 2, 3),
        drop_path_rate=0.2,
        norm="SyncBN",
    ),
    neck=dict(in_channels=[96, 192, 384, 768]),
)
param_scheduler = [
    dict(type="LinearLR", start_factor=0.001, by_epoch=False, begin=0, end=1000),
    dict(type="MultiStepLR", by_epoch=True, begin=0, end=36, milestones=[27, 33], gamma=0.1),
]
train_cfg = dict(max_epochs=36)
