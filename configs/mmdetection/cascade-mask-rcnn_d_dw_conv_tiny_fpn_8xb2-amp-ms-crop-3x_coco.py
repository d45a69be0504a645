"""Cascade Mask R-CNN, COCO, D-DW-Conv tiny (Table 3: 50.5 box AP, 43.7 mask AP)."""

_base_ = [
    "./_base_/cascade_mask_rcnn.py",
    "./_base_/coco.py",
    "./_base_/schedule_3x.py",
    "./_base_/default_runtime.py",
]
model = dict(backbone=dict(type="d_dw_conv_tiny", init="atten4vis_in1k"))
