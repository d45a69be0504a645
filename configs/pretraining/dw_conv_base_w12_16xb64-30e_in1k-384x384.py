"""DW-Conv, base, 384x384 with kernels of 12x12, resized from 7x7 (Table 14)."""

_base_ = "./_base_/in1k_384_30e.py"
model = dict(name="dw_conv_base", init="atten4vis_in1k", window_size=12)
