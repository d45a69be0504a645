"""Cascade Mask R-CNN, COCO, DW-Conv tiny (Table 3: 49.9 box AP, 43.4 mask AP)."""

from .common.tiny import data, dataloader, lr_multiplier, model, optimizer, train

model.backbone.bottom_up.update(name="dw_conv_tiny", init="atten4vis_in1k")
