"""Cascade Mask R-CNN, COCO, Swin base from 22K (Table 11: 53.4 box AP, 46.1 mask AP)."""

from .common.base import data, dataloader, lr_multiplier, model, optimizer, train

model.backbone.bottom_up.update(name="swin_base", init="ms_in22k")
