"""A small Cascade Mask R-CNN, I-D-DW-Conv nano; ``model.backbone.type`` takes any other nano."""

_base_ = "./_base_/nano.py"
model = dict(backbone=dict(type="i_d_dw_conv_nano"))
