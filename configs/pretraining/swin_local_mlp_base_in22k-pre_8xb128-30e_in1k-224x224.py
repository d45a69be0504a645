"""Swin-Local-MLP, base, ImageNet-1K after ImageNet-22K (not in the paper's tables)."""

_base_ = "./_base_/in22k_to_in1k_30e.py"
model = dict(name="swin_local_mlp_base", init="checkpoints/swin_local_mlp_base_in22k.pth")
