"""I-D-DW-Conv, base, ImageNet-1K after ImageNet-22K (Table 10: 85.2 top-1)."""

_base_ = "./_base_/in22k_to_in1k_30e.py"
model = dict(name="i_d_dw_conv_base", init="checkpoints/i_d_dw_conv_base_in22k.pth")
