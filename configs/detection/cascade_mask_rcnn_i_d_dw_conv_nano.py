"""A small Cascade Mask R-CNN for small data and a CPU, I-D-DW-Conv nano, from random weights."""

from .common.nano import data, dataloader, lr_multiplier, model, optimizer, train

model.backbone.bottom_up.update(name="i_d_dw_conv_nano")
