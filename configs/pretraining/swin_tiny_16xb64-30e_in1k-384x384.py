"""Swin, tiny, 384x384 after 224x224 (Table 14: 81.8 top-1)."""

_base_ = "./_base_/in1k_384_30e.py"
model = dict(name="swin_tiny", init="ms_in1k")
