"""Swin, base, 384x384 with windows of 12x12, resized from 7x7 (not in the paper's tables)."""

_base_ = "./_base_/in1k_384_w12_30e.py"
model = dict(name="swin_base", init="ms_in1k")
