"""Cascade Mask R-CNN, COCO, Swin tiny (Table 3: 50.5 box AP, 43.7 mask AP)."""

from .common.data import data, dataloader
from .common.model import model
from .common.schedule import lr_multiplier, optimizer, train

model.backbone.bottom_up.update(name="swin_tiny", drop_path_rate=0.2, init="ms_in1k")
