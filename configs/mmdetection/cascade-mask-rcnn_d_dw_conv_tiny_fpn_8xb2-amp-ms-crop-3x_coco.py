"""Cascade Mask R-CNN, COCO, D-DW-Conv tiny (Table 3: 50.5 box AP, 43.7 mask AP)."""

_base_ = "./_base_/tiny.py"
model = dict(backbone=dict(type="d_dw_conv_tiny", init="atten4vis_in1k"))
