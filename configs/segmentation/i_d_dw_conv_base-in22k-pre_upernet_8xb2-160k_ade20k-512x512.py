"""UPerNet, ADE20K, I-D-DW-Conv base from ImageNet-22K (Table 11: 51.3 mIoU)."""

_base_ = "./i_d_dw_conv_base_upernet_8xb2-160k_ade20k-512x512.py"
model = dict(backbone=dict(init="checkpoints/i_d_dw_conv_base_in22k.pth"))
