"""Cascade Mask R-CNN, COCO, DW-Conv base from 22K (Table 11: 52.0 box AP, 45.0 mask AP)."""

from .common.base import data, dataloader, lr_multiplier, model, optimizer, train

model.backbone.bottom_up.update(name="dw_conv_base", init="checkpoints/dw_conv_base_in22k.pth")
