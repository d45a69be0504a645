"""Cascade Mask R-CNN, COCO, Swin base (Table 3: 51.9 box AP, 45.0 mask AP)."""

_base_ = "./_base_/base.py"
model = dict(backbone=dict(type="swin_base", init="ms_in1k"))
