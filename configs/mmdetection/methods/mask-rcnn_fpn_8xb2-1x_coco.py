"""Mask R-CNN, COCO, MMDetection's 1x; ``model.backbone.type`` takes any backbone."""

_base_ = [
    "mmdet::_base_/models/mask-rcnn_r50_fpn.py",
    "../_base_/coco_1x.py",
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
