"""A small UPerNet for small data and a CPU, Swin nano, from random weights."""

_base_ = [
    "./_base_/models/upernet_nano.py",
    "./_base_/datasets/small.py",
    "./_base_/schedules/schedule_600.py",
    "./_base_/default_runtime.py",
]
model = dict(backbone=dict(type="swin_nano"))
