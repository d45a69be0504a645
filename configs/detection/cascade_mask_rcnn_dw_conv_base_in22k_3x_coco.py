"""Cascade Mask R-CNN, COCO, DW-Conv base from 22K (Table 11: 52.0 box AP, 45.0 mask AP)."""

from .common.data import data, dataloader
from .common.model import model
from .common.schedule import lr_multiplier, optimizer, train

model.backbone.bottom_up.update(
    name="dw_conv_base", drop_path_rate=0.3, init="checkpoints/dw_conv_base_in22k.pth"
)
