"""Cascade Mask R-CNN, COCO, I-D-DW-Conv base (Table 3: 51.8 box AP, 44.8 mask AP)."""

_base_ = "./_base_/base.py"
model = dict(backbone=dict(type="i_d_dw_conv_base", init="checkpoints/i_d_dw_conv_base_in1k.pth"))
