"""Swin-Local-MLP, tiny, ImageNet-1K from random weights (Table 2: 80.3 top-1)."""

_base_ = "./_base_/in1k_300e_tiny.py"
model = dict(name="swin_local_mlp_tiny")
