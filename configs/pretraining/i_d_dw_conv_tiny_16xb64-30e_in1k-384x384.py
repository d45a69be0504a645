"""I-D-DW-Conv, tiny, 384x384 after 224x224 (not in the paper's tables)."""

_base_ = "./_base_/in1k_384_30e.py"
model = dict(name="i_d_dw_conv_tiny", init="checkpoints/i_d_dw_conv_tiny_in1k.pth")
