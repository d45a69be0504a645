"""UPerNet, ADE20K, Swin tiny (Table 3: 44.5 mIoU)."""

_base_ = "./_base_/tiny.py"
model = dict(backbone=dict(type="swin_tiny", init="ms_in1k"))
