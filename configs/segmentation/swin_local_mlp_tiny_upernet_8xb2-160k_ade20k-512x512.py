"""UPerNet, ADE20K, Swin-Local-MLP tiny."""

_base_ = [
    "./_base_/models/upernet.py",
    "./_base_/datasets/ade20k.py",
    "./_base_/schedules/schedule_160k.py",
    "./_base_/default_runtime.py",
]
model = dict(
    backbone=dict(type="swin_local_mlp_tiny", init="checkpoints/swin_local_mlp_tiny_in1k.pth")
)
