"""D-DW-Conv, base, ImageNet-1K after ImageNet-22K (Table 10: 85.0 top-1)."""

_base_ = "./_base_/in22k_to_in1k_30e.py"
model = dict(name="d_dw_conv_base", init="checkpoints/d_dw_conv_base_in22k.pth")
