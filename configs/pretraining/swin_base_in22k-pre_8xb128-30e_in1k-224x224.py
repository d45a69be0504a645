"""Swin, base, ImageNet-1K after ImageNet-22K (Table 10: 85.2 top-1)."""

_base_ = "./_base_/in22k_to_in1k_30e.py"
model = dict(name="swin_base", init="ms_in22k")
