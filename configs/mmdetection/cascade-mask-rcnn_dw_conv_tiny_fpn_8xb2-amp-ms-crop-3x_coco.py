"""Cascade Mask R-CNN, COCO, DW-Conv tiny (Table 3: 49.9 box AP, 43.4 mask AP)."""

_base_ = "./_base_/tiny.py"
model = dict(backbone=dict(type="dw_conv_tiny", init="atten4vis_in1k"))
