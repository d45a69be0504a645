"""Cascade Mask R-CNN, COCO, Swin-Local-MLP base from 22K (not in the paper's tables)."""

_base_ = "./cascade-mask-rcnn_swin_local_mlp_base_fpn_8xb2-amp-ms-crop-3x_coco.py"
model = dict(backbone=dict(init="checkpoints/swin_local_mlp_base_in22k.pth"))
