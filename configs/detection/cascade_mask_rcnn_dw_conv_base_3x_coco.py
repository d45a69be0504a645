"""Cascade Mask R-CNN, COCO, DW-Conv base (Table 3: 51.1 box AP, 44.2 mask AP)."""

from .common.base import data, dataloader, lr_multiplier, model, optimizer, train

model.backbone.bottom_up.update(name="dw_conv_base", init="atten4vis_in1k")
