"""Cascade Mask R-CNN, COCO, Swin base from 22K (Table 11: 53.4 box AP, 46.1 mask AP)."""

_base_ = "./cascade-mask-rcnn_swin_base_fpn_8xb2-amp-ms-crop-3x_coco.py"
model = dict(backbone=dict(init="ms_in22k"))
