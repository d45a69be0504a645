"""UPerNet, ADE20K, Swin-Local-MLP base from ImageNet-22K (not in the paper's tables)."""

_base_ = "./swin_local_mlp_base_upernet_8xb2-160k_ade20k-512x512.py"
model = dict(backbone=dict(init="checkpoints/swin_local_mlp_base_in22k.pth"))
