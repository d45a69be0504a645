"""UPerNet, ADE20K, I-D-DW-Conv tiny (Table 3: 46.2 mIoU)."""

_base_ = "./_base_/tiny.py"
model = dict(backbone=dict(type="i_d_dw_conv_tiny", init="checkpoints/i_d_dw_conv_tiny_in1k.pth"))
