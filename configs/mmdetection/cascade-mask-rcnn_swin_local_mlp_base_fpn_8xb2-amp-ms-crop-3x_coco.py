"""Cascade Mask R-CNN, COCO, Swin-Local-MLP base (not in the paper's tables)."""

_base_ = "./_base_/base.py"
model = dict(
    backbone=dict(type="swin_local_mlp_base", init="checkpoints/swin_local_mlp_base_in1k.pth")
)
