"""DW-Conv, base, ImageNet-1K from random weights (Table 2: 83.2 top-1)."""

_base_ = "./_base_/in1k_300e_base.py"
model = dict(name="dw_conv_base")
