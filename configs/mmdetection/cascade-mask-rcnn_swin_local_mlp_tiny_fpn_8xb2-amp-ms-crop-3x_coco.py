"""Cascade Mask R-CNN, COCO, Swin-Local-MLP tiny."""

_base_ = [
    "./_base_/cascade_mask_rcnn.py",
    "./_base_/coco.py",
    "./_base_/schedule_3x.py",
    "./_base_/default_runtime.py",
]
model = dict(
    backbone=dict(type="swin_local_mlp_tiny", init="checkpoints/swin_local_mlp_tiny_in1k.pth")
)
