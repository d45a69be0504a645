"""Cascade Mask R-CNN, COCO, Swin base (Table 3: 51.9 box AP, 45.0 mask AP)."""

from .common.data import data, dataloader
from .common.model import model
from .common.schedule import lr_multiplier, optimizer, train

model.backbone.bottom_up.update(name="swin_base", drop_path_rate=0.3, init="ms_in1k")
