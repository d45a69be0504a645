"""Cascade Mask R-CNN, COCO, DW-Conv base from 22K (Table 11: 52.0 box AP, 45.0 mask AP)."""

_base_ = "./cascade-mask-rcnn_dw_conv_base_fpn_8xb2-amp-ms-crop-3x_coco.py"
model = dict(backbone=dict(init="checkpoints/dw_conv_base_in22k.pth"))
