"""Cascade Mask R-CNN, COCO, Swin-Local-MLP base (not in the paper's tables)."""

from .common.base import data, dataloader, lr_multiplier, model, optimizer, train

model.backbone.bottom_up.update(
    name="swin_local_mlp_base", init="checkpoints/swin_local_mlp_base_in1k.pth"
)
