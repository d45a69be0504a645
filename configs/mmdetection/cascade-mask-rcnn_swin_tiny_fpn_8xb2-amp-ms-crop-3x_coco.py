"""Cascade Mask R-CNN, COCO, Swin tiny (Table 3: 50.5 box AP, 43.7 mask AP)."""

_base_ = "./_base_/tiny.py"
model = dict(backbone=dict(type="swin_tiny", init="ms_in1k"))
