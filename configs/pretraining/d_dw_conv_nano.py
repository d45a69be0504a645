"""D-DW-Conv, nano, on small data."""

_base_ = "./_base_/nano.py"
model = dict(name="d_dw_conv_nano")
