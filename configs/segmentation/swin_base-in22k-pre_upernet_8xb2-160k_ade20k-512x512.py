"""UPerNet, ADE20K, Swin base from ImageNet-22K (Table 11: 49.4 mIoU)."""

_base_ = "./swin_base_upernet_8xb2-160k_ade20k-512x512.py"
model = dict(backbone=dict(init="ms_in22k"))
