"""UPerNet, ADE20K, I-D-DW-Conv base (Table 3: 47.8 mIoU)."""

_base_ = "./i_d_dw_conv_tiny_upernet_8xb2-160k_ade20k-512x512.py"
model = dict(
    backbone=dict(type="i_d_dw_conv_base", init="checkpoints/i_d_dw_conv_base_in1k.pth"),
    decode_head=dict(in_channels=[128, 256, 512, 1024]),
    auxiliary_head=dict(in_channels=512),
)
