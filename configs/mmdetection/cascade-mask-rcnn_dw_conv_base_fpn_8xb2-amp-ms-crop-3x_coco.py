"""Cascade Mask R-CNN, COCO, DW-Conv base (Table 3: 51.1 box AP, 44.2 mask AP)."""

_base_ = [
    "./_base_/cascade_mask_rcnn.py",
    "./_base_/coco.py",
    "./_base_/schedule_3x.py",
    "./_base_/default_runtime.py",
]
model = dict(
    backbone=dict(type="dw_conv_base", drop_path_rate=0.3, init="atten4vis_in1k"),
    neck=dict(in_channels=[128, 256, 512, 1024]),
)
