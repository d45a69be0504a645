"""Cascade Mask R-CNN, COCO, I-D-DW-Conv base from 22K (Table 11: 52.9 box AP, 45.8 mask AP)."""

_base_ = "./cascade-mask-rcnn_i_d_dw_conv_base_fpn_8xb2-amp-ms-crop-3x_coco.py"
model = dict(backbone=dict(init="checkpoints/i_d_dw_conv_base_in22k.pth"))
