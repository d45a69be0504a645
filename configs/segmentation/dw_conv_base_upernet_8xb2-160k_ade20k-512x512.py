"""UPerNet, ADE20K, DW-Conv base (Table 3: 48.3 mIoU)."""

_base_ = "./dw_conv_tiny_upernet_8xb2-160k_ade20k-512x512.py"
model = dict(
    backbone=dict(type="dw_conv_base", init="atten4vis_in1k"),
    decode_head=dict(in_channels=[128, 256, 512, 1024]),
    auxiliary_head=dict(in_channels=512),
)
