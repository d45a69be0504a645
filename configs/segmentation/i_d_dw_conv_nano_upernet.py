"""A small UPerNet for small data and a CPU, I-D-DW-Conv nano, from random weights."""

_base_ = "./_base_/nano.py"
model = dict(backbone=dict(type="i_d_dw_conv_nano"))
