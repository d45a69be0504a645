"""DW-Conv, nano, on small data."""

_base_ = "./_base_/nano.py"
model = dict(name="dw_conv_nano")
