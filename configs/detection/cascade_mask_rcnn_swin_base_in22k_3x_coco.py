"""Cascade Mask R-CNN, COCO, Swin base from 22K (Table 11: 53.4 box AP, 46.1 mask AP)."""

from .common.data import data, dataloader
from .common.model import model
from .common.schedule import lr_multiplier, optimizer, train

model.backbone.bottom_up.update(name="swin_base", drop_path_rate=0.3, init="ms_in22k")
