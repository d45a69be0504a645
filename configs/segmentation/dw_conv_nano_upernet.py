"""A small UPerNet for small data and a CPU, DW-Conv nano, from random weights."""

_base_ = "./_base_/nano.py"
model = dict(backbone=dict(type="dw_conv_nano"))
