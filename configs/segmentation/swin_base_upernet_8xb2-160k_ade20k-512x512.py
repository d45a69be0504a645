"""UPerNet, ADE20K, Swin base (Table 3: 48.1 mIoU)."""

_base_ = "./_base_/base.py"
model = dict(backbone=dict(type="swin_base", init="ms_in1k"))
