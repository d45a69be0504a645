"""Cascade Mask R-CNN, COCO, DW-Conv tiny (Table 3: 49.9 box AP, 43.4 mask AP)."""

_base_ = [
    "./_base_/cascade_mask_rcnn.py",
    "./_base_/coco.py",
    "./_base_/schedule_3x.py",
    "./_base_/default_runtime.py",
]
model = dict(backbone=dict(type="dw_conv_tiny", init="atten4vis_in1k"))
