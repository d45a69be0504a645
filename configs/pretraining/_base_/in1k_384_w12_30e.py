"""ImageNet-1K at 384x384 with windows or kernels of 12x12, resized from 7x7."""

_base_ = "./in1k_384_30e.py"
model = dict(window_size=12)
