"""A small Cascade Mask R-CNN for small data and a CPU, DW-Conv nano, from random weights."""

from .common.nano import data, dataloader, lr_multiplier, model, optimizer, train

model.backbone.bottom_up.update(name="dw_conv_nano")
