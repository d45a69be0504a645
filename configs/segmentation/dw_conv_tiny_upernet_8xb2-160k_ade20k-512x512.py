"""UPerNet, ADE20K, DW-Conv tiny (Table 3: 45.5 mIoU)."""

_base_ = "./_base_/tiny.py"
model = dict(backbone=dict(type="dw_conv_tiny", init="atten4vis_in1k"))
