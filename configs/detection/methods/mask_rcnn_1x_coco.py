"""Mask R-CNN, COCO, Detectron2's 1x; ``model.backbone.bottom_up.name`` takes any backbone."""

from ..common.zoo import data, dataloader, optimizer, train, zoo_model, zoo_schedule

model = zoo_model("mask_rcnn_fpn", ["res2", "res3", "res4", "res5"])
lr_multiplier = zoo_schedule(1)
