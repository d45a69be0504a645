"""Cascade Mask R-CNN on COCO, base; a recipe adds the backbone and its initial weights."""

_base_ = ["./cascade_mask_rcnn.py", "./coco.py", "./schedule_3x.py", "./default_runtime.py"]
model = dict(
    backbone=dict(drop_path_rate=0.3),
    neck=dict(in_channels=[128, 256, 512, 1024]),
)
