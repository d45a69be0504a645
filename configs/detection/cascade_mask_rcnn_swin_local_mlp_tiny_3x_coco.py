"""Cascade Mask R-CNN, COCO, Swin-Local-MLP tiny (not in the paper's tables)."""

from .common.tiny import data, dataloader, lr_multiplier, model, optimizer, train

model.backbone.bottom_up.update(
    name="swin_local_mlp_tiny", init="checkpoints/swin_local_mlp_tiny_in1k.pth"
)
