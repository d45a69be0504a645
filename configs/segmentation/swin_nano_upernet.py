"""A small UPerNet for small data and a CPU, Swin nano, from random weights."""

_base_ = "./_base_/nano.py"
model = dict(backbone=dict(type="swin_nano"))
