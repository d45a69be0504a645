"""Cascade Mask R-CNN, COCO, D-DW-Conv base from 22K (Table 11: 51.9 box AP, 45.0 mask AP)."""

from .common.base import data, dataloader, lr_multiplier, model, optimizer, train

model.backbone.bottom_up.update(name="d_dw_conv_base", init="checkpoints/d_dw_conv_base_in22k.pth")
