"""Cascade Mask R-CNN on COCO, base; a recipe adds the backbone and its initial weights."""

from .data import data, dataloader
from .model import model
from .schedule import lr_multiplier, optimizer, train

model.backbone.bottom_up.drop_path_rate = 0.3
