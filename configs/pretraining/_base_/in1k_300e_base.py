"""ImageNet-1K from random weights, base; a recipe adds the network."""

_base_ = "./in1k_300e.py"
model = dict(drop_path_rate=0.5)
