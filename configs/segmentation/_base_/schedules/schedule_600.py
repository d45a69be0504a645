"""600 iterations from random weights: minutes on a CPU."""

_base_ = "./schedule_160k.py"
optim_wrapper = dict(optimizer=dict(lr=3e-3))
param_scheduler = [
    dict(type="LinearLR", start_factor=0.01, by_epoch=False, begin=0, end=50),
    dict(type="PolyLR", eta_min=0.0, power=1.0, by_epoch=False, begin=50, end=600),
]
train_cfg = dict(max_iters=600, val_interval=300)
default_hooks = dict(logger=dict(interval=10), checkpoint=dict(interval=100))
