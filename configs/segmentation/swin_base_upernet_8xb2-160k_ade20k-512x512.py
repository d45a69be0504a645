"""UPerNet, ADE20K, Swin base (Table 3: 48.1 mIoU)."""

_base_ = "./swin_tiny_upernet_8xb2-160k_ade20k-512x512.py"
model = dict(
    backbone=dict(type="swin_base", init="checkpoints/swin_base_in1k.pth"),
    decode_head=dict(in_channels=[128, 256, 512, 1024]),
    auxiliary_head=dict(in_channels=512),
)
