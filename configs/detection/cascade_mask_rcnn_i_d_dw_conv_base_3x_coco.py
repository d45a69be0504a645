"""Cascade Mask R-CNN, COCO, I-D-DW-Conv base (Table 3: 51.8 box AP, 44.8 mask AP)."""

from .common.data import data, dataloader
from .common.model import model
from .common.schedule import lr_multiplier, optimizer, train

model.backbone.bottom_up.update(
    name="i_d_dw_conv_base", drop_path_rate=0.3, init="checkpoints/i_d_dw_conv_base_in1k.pth"
)
