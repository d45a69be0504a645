"""Cascade Mask R-CNN, COCO, I-D-DW-Conv tiny (Table 3: 50.8 box AP, 44.0 mask AP)."""

_base_ = "./_base_/tiny.py"
model = dict(backbone=dict(type="i_d_dw_conv_tiny", init="checkpoints/i_d_dw_conv_tiny_in1k.pth"))
