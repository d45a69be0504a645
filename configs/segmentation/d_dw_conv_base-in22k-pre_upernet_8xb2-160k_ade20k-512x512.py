"""UPerNet, ADE20K, D-DW-Conv base from ImageNet-22K (Table 11: 49.6 mIoU)."""

_base_ = "./d_dw_conv_base_upernet_8xb2-160k_ade20k-512x512.py"
model = dict(backbone=dict(init="checkpoints/d_dw_conv_base_in22k.pth"))
