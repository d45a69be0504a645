"""Cascade Mask R-CNN, COCO, Swin tiny (Table 3: 50.5 box AP, 43.7 mask AP)."""

from .common.tiny import data, dataloader, lr_multiplier, model, optimizer, train

model.backbone.bottom_up.update(name="swin_tiny", init="ms_in1k")
