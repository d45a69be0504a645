"""ImageNet-1K from a network trained on ImageNet-22K: 30 epochs; classifier rows by wnid."""

_base_ = "./in1k_300e.py"
model = dict(drop_path_rate=0.2)
optim_wrapper = dict(optimizer=dict(lr=4e-5, weight_decay=1e-8))
param_scheduler = [
    dict(type="LinearLR", start_factor=1e-3, begin=0, end=5, convert_to_iter_based=True),
    dict(type="CosineAnnealingLR", eta_min=4e-7, begin=5, end=30, convert_to_iter_based=True),
]
train_cfg = dict(max_epochs=30)
