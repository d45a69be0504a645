"""ImageNet-1K from a network trained on ImageNet-22K: 30 epochs; classifier rows by wnid."""

_base_ = "./in1k_300e.py"
model = dict(drop_path_rate=0.2)
optim_wrapper = dict(optimizer=dict(lr=4e-5, weight_decay=1e-8))
# Swin's 2e-5, 2e-8 and 2e-7 for 512 images, scaled to 1024.
param_scheduler = [
    dict(type="WarmupCosineLR", warmup=5, warmup_lr=4e-8, eta_min=4e-7, convert_to_iter_based=True)
]
train_cfg = dict(max_epochs=30)
