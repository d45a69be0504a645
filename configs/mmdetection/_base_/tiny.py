"""Cascade Mask R-CNN on COCO, tiny; a recipe adds the backbone and its initial weights."""

_base_ = ["./cascade_mask_rcnn.py", "./coco.py", "./schedule_3x.py", "./default_runtime.py"]
model = dict(
    backbone=dict(drop_path_rate=0.2),
    neck=dict(in_channels=[96, 192, 384, 768]),
)
