"""UPerNet, ADE20K, D-DW-Conv base (Table 3: 48.0 mIoU)."""

_base_ = "./_base_/base.py"
model = dict(backbone=dict(type="d_dw_conv_base", init="atten4vis_in1k"))
