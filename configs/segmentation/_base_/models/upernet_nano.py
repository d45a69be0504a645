"""A small UPerNet for small data and a CPU, from random weights."""

_base_ = "./upernet.py"
model = dict(
    data_preprocessor=dict(size=(128, 128)),
    backbone=dict(type="i_d_dw_conv_nano", drop_path_rate=0.0),
    decode_head=dict(in_channels=[32, 64, 128, 256], channels=64),
    auxiliary_head=dict(in_channels=128, channels=32),
)
