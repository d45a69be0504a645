"""Cascade Mask R-CNN, COCO, DW-Conv base (Table 3: 51.1 box AP, 44.2 mask AP)."""

_base_ = "./_base_/base.py"
model = dict(backbone=dict(type="dw_conv_base", init="atten4vis_in1k"))
