"""D-DW-Conv, tiny, ImageNet-1K from random weights (Table 2: 81.9 top-1)."""

_base_ = "./_base_/in1k_300e_tiny.py"
model = dict(name="d_dw_conv_tiny")
