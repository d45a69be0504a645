"""UPerNet, ADE20K, DW-Conv base (Table 3: 48.3 mIoU)."""

_base_ = "./_base_/base.py"
model = dict(backbone=dict(type="dw_conv_base", init="atten4vis_in1k"))
