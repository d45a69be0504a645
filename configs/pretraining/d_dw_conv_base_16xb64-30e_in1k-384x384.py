"""D-DW-Conv, base, 384x384 after 224x224 (not in the paper's tables)."""

_base_ = "./_base_/in1k_384_30e.py"
model = dict(name="d_dw_conv_base", init="atten4vis_in1k")
