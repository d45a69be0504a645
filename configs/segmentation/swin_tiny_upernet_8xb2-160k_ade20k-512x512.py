"""UPerNet, ADE20K, Swin tiny (Table 3: 44.5 mIoU)."""

_base_ = [
    "./_base_/models/upernet.py",
    "./_base_/datasets/ade20k.py",
    "./_base_/schedules/schedule_160k.py",
    "./_base_/default_runtime.py",
]
model = dict(backbone=dict(type="swin_tiny", init="ms_in1k"))
