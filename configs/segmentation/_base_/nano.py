"""A small UPerNet for small data and CPUs, from random weights; a recipe adds the backbone."""

_base_ = [
    "./models/upernet.py",
    "./datasets/small.py",
    "./schedules/schedule_600.py",
    "./default_runtime.py",
]
model = dict(
    data_preprocessor=dict(size=(256, 256)),
    backbone=dict(drop_path_rate=0.0),
    decode_head=dict(in_channels=[32, 64, 128, 256], channels=64),
    auxiliary_head=dict(in_channels=128, channels=32),
)
