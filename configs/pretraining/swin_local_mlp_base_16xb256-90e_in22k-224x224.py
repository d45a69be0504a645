"""Swin-Local-MLP, base, ImageNet-22K from random weights (not in the paper's tables)."""

_base_ = "./_base_/in22k_90e.py"
model = dict(name="swin_local_mlp_base")
