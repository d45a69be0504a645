"""RetinaNet, COCO, Detectron2's 1x; ``model.backbone.bottom_up.name`` takes any backbone."""

from detectron2.config import LazyCall as L

from dense.detection.backbone import last_level_p6p7

from ..common.zoo import data, dataloader, optimizer, train, zoo_model, zoo_schedule

model = zoo_model("retinanet", ["res3", "res4", "res5"])
model.backbone.top_block = L(last_level_p6p7)(
    name="${..bottom_up.name}", out_channels="${..out_channels}"
)
dataloader["train"].mapper.use_instance_mask = False
lr_multiplier = zoo_schedule(1)
