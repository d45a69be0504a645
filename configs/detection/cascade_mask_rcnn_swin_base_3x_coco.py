"""Cascade Mask R-CNN, COCO, Swin base (Table 3: 51.9 box AP, 45.0 mask AP)."""

from .common.base import data, dataloader, lr_multiplier, model, optimizer, train

model.backbone.bottom_up.update(name="swin_base", init="ms_in1k")
