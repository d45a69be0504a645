"""Cascade Mask R-CNN, COCO, D-DW-Conv base (Table 3: 51.2 box AP, 44.4 mask AP)."""

_base_ = "./_base_/base.py"
model = dict(backbone=dict(type="d_dw_conv_base", init="atten4vis_in1k"))
