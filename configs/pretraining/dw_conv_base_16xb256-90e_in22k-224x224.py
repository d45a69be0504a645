"""DW-Conv, base, ImageNet-22K from random weights (the pretraining of Tables 10 and 11)."""

_base_ = "./_base_/in22k_90e.py"
model = dict(name="dw_conv_base")
