"""Cascade Mask R-CNN, COCO, DW-Conv base (Table 3: 51.1 box AP, 44.2 mask AP)."""

from .common.data import data, dataloader
from .common.model import model
from .common.schedule import lr_multiplier, optimizer, train

model.backbone.bottom_up.update(name="dw_conv_base", drop_path_rate=0.3, init="atten4vis_in1k")
