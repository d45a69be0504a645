"""DW-Conv, tiny, 384x384 after 224x224 (Table 14: 82.2 top-1)."""

_base_ = "./_base_/in1k_384_30e.py"
model = dict(name="dw_conv_tiny", init="atten4vis_in1k")
