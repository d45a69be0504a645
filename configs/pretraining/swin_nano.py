"""Swin, nano, on small data."""

_base_ = "./_base_/nano.py"
model = dict(name="swin_nano")
