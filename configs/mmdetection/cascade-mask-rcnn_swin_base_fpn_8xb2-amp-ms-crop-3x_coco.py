"""Cascade Mask R-CNN, COCO, Swin base (Table 3: 51.9 box AP, 45.0 mask AP)."""

_base_ = [
    "./_base_/cascade_mask_rcnn.py",
    "./_base_/coco.py",
    "./_base_/schedule_3x.py",
    "./_base_/default_runtime.py",
]
model = dict(
    backbone=dict(type="swin_base", drop_path_rate=0.3, init="ms_in1k"),
    neck=dict(in_channels=[128, 256, 512, 1024]),
)
