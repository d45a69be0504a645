"""Swin-Local-MLP, tiny, 384x384 after 224x224 (not in the paper's tables)."""

_base_ = "./_base_/in1k_384_30e.py"
model = dict(name="swin_local_mlp_tiny", init="checkpoints/swin_local_mlp_tiny_in1k.pth")
