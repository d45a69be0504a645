"""Cascade Mask R-CNN, COCO, Detectron2's 1x; any backbone by ``model.backbone.bottom_up.name``."""

from ..common.zoo import data, dataloader, optimizer, train, zoo_model, zoo_schedule

model = zoo_model("cascade_rcnn", ["res2", "res3", "res4", "res5"])
lr_multiplier = zoo_schedule(1)
