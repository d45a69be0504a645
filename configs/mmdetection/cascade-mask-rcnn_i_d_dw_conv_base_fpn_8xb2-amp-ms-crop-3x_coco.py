"""Cascade Mask R-CNN, COCO, I-D-DW-Conv base (Table 3: 51.8 box AP, 44.8 mask AP)."""

_base_ = [
    "./_base_/cascade_mask_rcnn.py",
    "./_base_/coco.py",
    "./_base_/schedule_3x.py",
    "./_base_/default_runtime.py",
]
model = dict(
    backbone=dict(
        type="i_d_dw_conv_base", drop_path_rate=0.3, init="checkpoints/i_d_dw_conv_base_in1k.pth"
    ),
    neck=dict(in_channels=[128, 256, 512, 1024]),
)
