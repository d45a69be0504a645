"""Cascade Mask R-CNN, COCO, D-DW-Conv base (Table 3: 51.2 box AP, 44.4 mask AP)."""

from .common.data import data, dataloader
from .common.model import model
from .common.schedule import lr_multiplier, optimizer, train

model.backbone.bottom_up.update(name="d_dw_conv_base", drop_path_rate=0.3, init="atten4vis_in1k")
