"""Swin, tiny, 384x384 with windows of 12x12, resized from 7x7 (Table 14: 82.4 top-1)."""

_base_ = "./_base_/in1k_384_w12_30e.py"
model = dict(name="swin_tiny", init="ms_in1k")
