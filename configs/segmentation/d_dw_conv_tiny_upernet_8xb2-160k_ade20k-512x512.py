"""UPerNet, ADE20K, D-DW-Conv tiny (Table 3: 45.7 mIoU)."""

_base_ = "./_base_/tiny.py"
model = dict(backbone=dict(type="d_dw_conv_tiny", init="atten4vis_in1k"))
