"""Cascade Mask R-CNN, COCO, D-DW-Conv tiny (Table 3: 50.5 box AP, 43.7 mask AP)."""

from .common.data import data, dataloader
from .common.model import model
from .common.schedule import lr_multiplier, optimizer, train

model.backbone.bottom_up.update(name="d_dw_conv_tiny", drop_path_rate=0.2, init="atten4vis_in1k")
