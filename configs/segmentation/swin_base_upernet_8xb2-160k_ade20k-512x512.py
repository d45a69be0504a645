"""UPerNet, ADE20K, Swin base (Table 3: 48.1 mIoU)."""

_base_ = "./swin_tiny_upernet_8xb2-160k_ade20k-512x512.py"
model = dict(
    backbone=dict(type="swin_base", init="ms_in1k"),
    decode_head=dict(in_channels=[128, 256, 512, 1024]),
    auxiliary_head=dict(in_channels=512),
)
