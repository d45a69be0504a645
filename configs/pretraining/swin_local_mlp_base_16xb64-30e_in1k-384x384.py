"""Swin-Local-MLP, base, 384x384 after 224x224 (not in the paper's tables)."""

_base_ = "./_base_/in1k_384_30e.py"
model = dict(name="swin_local_mlp_base", init="checkpoints/swin_local_mlp_base_in1k.pth")
