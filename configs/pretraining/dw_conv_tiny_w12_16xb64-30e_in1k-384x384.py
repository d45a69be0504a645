"""DW-Conv, tiny, 384x384 with kernels of 12x12, resized from 7x7 (Table 14: 82.1 top-1)."""

_base_ = "./_base_/in1k_384_w12_30e.py"
model = dict(name="dw_conv_tiny", init="atten4vis_in1k")
