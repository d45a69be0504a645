"""Cascade Mask R-CNN, COCO, I-D-DW-Conv tiny (Table 3: 50.8 box AP, 44.0 mask AP)."""

from .common.tiny import data, dataloader, lr_multiplier, model, optimizer, train

model.backbone.bottom_up.update(
    name="i_d_dw_conv_tiny", init="checkpoints/i_d_dw_conv_tiny_in1k.pth"
)
