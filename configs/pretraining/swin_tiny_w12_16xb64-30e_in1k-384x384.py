"""Swin, tiny, 384x384 with windows of 12x12, resized from 7x7 (Table 14)."""

_base_ = "./_base_/in1k_384_30e.py"
model = dict(name="swin_tiny", init="ms_in1k", window_size=12)
