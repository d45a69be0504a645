"""Cascade Mask R-CNN, COCO, Swin-Local-MLP tiny (not in the paper's tables)."""

from .common.data import data, dataloader
from .common.model import model
from .common.schedule import lr_multiplier, optimizer, train

model.backbone.bottom_up.update(
    name="swin_local_mlp_tiny", drop_path_rate=0.2, init="checkpoints/swin_local_mlp_tiny_in1k.pth"
)
