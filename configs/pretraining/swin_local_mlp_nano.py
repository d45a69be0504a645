"""Swin-Local-MLP, nano, on small data."""

_base_ = "./_base_/nano.py"
model = dict(name="swin_local_mlp_nano")
