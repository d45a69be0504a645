"""A small Cascade Mask R-CNN for small data and a CPU, Swin-Local-MLP nano, from random weights."""

from .common.nano import data, dataloader, lr_multiplier, model, optimizer, train

model.backbone.bottom_up.update(name="swin_local_mlp_nano")
