"""UPerNet, ADE20K, DW-Conv base from ImageNet-22K (Table 11: 50.1 mIoU)."""

_base_ = "./dw_conv_base_upernet_8xb2-160k_ade20k-512x512.py"
model = dict(backbone=dict(init="checkpoints/dw_conv_base_in22k.pth"))
