"""Cascade Mask R-CNN, COCO, I-D-DW-Conv base from 22K (Table 11: 52.9 box AP, 45.8 mask AP)."""

from .common.base import data, dataloader, lr_multiplier, model, optimizer, train

model.backbone.bottom_up.update(
    name="i_d_dw_conv_base", init="checkpoints/i_d_dw_conv_base_in22k.pth"
)
