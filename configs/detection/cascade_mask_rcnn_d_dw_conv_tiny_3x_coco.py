"""Cascade Mask R-CNN, COCO, D-DW-Conv tiny (Table 3: 50.5 box AP, 43.7 mask AP)."""

from .common.tiny import data, dataloader, lr_multiplier, model, optimizer, train

model.backbone.bottom_up.update(name="d_dw_conv_tiny", init="atten4vis_in1k")
