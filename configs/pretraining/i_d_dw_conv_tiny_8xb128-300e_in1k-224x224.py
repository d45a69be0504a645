"""I-D-DW-Conv, tiny, ImageNet-1K from random weights (Table 2)."""

_base_ = "./_base_/in1k_300e.py"
model = dict(name="i_d_dw_conv_tiny", drop_path_rate=0.2)
