"""UPerNet, ADE20K, I-D-DW-Conv base (Table 3: 47.8 mIoU)."""

_base_ = "./_base_/base.py"
model = dict(backbone=dict(type="i_d_dw_conv_base", init="checkpoints/i_d_dw_conv_base_in1k.pth"))
