"""UPerNet, ADE20K, D-DW-Conv tiny (Table 3: 45.7 mIoU)."""

_base_ = [
    "./_base_/models/upernet.py",
    "./_base_/datasets/ade20k.py",
    "./_base_/schedules/schedule_160k.py",
    "./_base_/default_runtime.py",
]
model = dict(backbone=dict(type="d_dw_conv_tiny", init="atten4vis_in1k"))
