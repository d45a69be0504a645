"""Swin-Local-MLP, base, ImageNet-1K from random weights (Table 2)."""

_base_ = "./_base_/in1k_300e.py"
model = dict(name="swin_local_mlp_base", drop_path_rate=0.5)
