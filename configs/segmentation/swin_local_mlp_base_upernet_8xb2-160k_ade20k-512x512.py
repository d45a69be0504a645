"""UPerNet, ADE20K, Swin-Local-MLP base."""

_base_ = "./swin_local_mlp_tiny_upernet_8xb2-160k_ade20k-512x512.py"
model = dict(
    backbone=dict(type="swin_local_mlp_base", init="checkpoints/swin_local_mlp_base_in1k.pth"),
    decode_head=dict(in_channels=[128, 256, 512, 1024]),
    auxiliary_head=dict(in_channels=512),
)
