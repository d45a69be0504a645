"""Cascade Mask R-CNN, COCO, Swin-Local-MLP base from 22K (not in the paper's tables)."""

from .common.data import data, dataloader
from .common.model import model
from .common.schedule import lr_multiplier, optimizer, train

model.backbone.bottom_up.update(
    name="swin_local_mlp_base", drop_path_rate=0.3, init="checkpoints/swin_local_mlp_base_in22k.pth"
)
