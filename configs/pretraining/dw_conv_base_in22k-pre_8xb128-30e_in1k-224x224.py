"""DW-Conv, base, ImageNet-1K after ImageNet-22K (Table 10: 84.8 top-1)."""

_base_ = "./_base_/in22k_to_in1k_30e.py"
model = dict(name="dw_conv_base", init="checkpoints/dw_conv_base_in22k.pth")
