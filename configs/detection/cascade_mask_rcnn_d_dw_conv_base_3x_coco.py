"""Cascade Mask R-CNN, COCO, D-DW-Conv base (Table 3: 51.2 box AP, 44.4 mask AP)."""

from .common.base import data, dataloader, lr_multiplier, model, optimizer, train

model.backbone.bottom_up.update(name="d_dw_conv_base", init="atten4vis_in1k")
