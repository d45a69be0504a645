"""Swin, tiny, ImageNet-1K from random weights (Table 2: 81.3 top-1)."""

_base_ = "./_base_/in1k_300e_tiny.py"
model = dict(name="swin_tiny")
