"""A small version of detector and loaders: a few hundred images, minutes on a CPU."""

from detectron2.config import LazyCall as L
from detectron2.solver import WarmupParamScheduler
from fvcore.common.param_scheduler import CosineParamScheduler

from .data import data, dataloader
from .model import model
from .schedule import optimizer, train

model.backbone.out_channels = 48
model.proposal_generator.anchor_generator.sizes = [[16], [32], [64], [96], [128]]
model.proposal_generator.batch_size_per_image = 64
model.proposal_generator.pre_nms_topk = (300, 300)
model.proposal_generator.post_nms_topk = (100, 100)
# On small images, too few of the larger anchors lie within the border.
model.proposal_generator.anchor_boundary_thresh = -1
model.roi_heads.batch_size_per_image = 32
for _head, _predictor in zip(
    model.roi_heads.box_heads, model.roi_heads.box_predictors, strict=True
):
    _head.conv_dims, _head.fc_dims = [48, 48], [128]
    _predictor.input_shape.channels = 128
model.roi_heads.mask_head.conv_dims = [48, 48, 48, 48]

_flip, _crop, _scale = dataloader["train"].mapper.augmentations
_scale.update(short_edge_length=[128, 144, 160, 176], max_size=256)
dataloader["train"].mapper.augmentations = [_flip, _scale]
dataloader["train"].update(total_batch_size=4, num_workers=2)
dataloader["test"].mapper.augmentations[0].update(short_edge_length=160, max_size=256)
dataloader["test"].num_workers = 2
dataloader["tta"].update(min_sizes=[128, 160, 192], max_size=320)

train.update(max_iter=640, eval_period=0, log_period=20)
train.amp.enabled = False
train.checkpointer.update(period=160, max_to_keep=3)

optimizer.lr = 2e-3
lr_multiplier = L(WarmupParamScheduler)(
    scheduler=L(CosineParamScheduler)(start_value=1.0, end_value=0.01),
    warmup_length=0.05,
    warmup_factor=0.01,
)
