"""Every setting of the recipes is Detectron2's own, or a difference said here."""

import detectron2.data.transforms as T
import pytest
from detectron2.model_zoo import get_config
from detectron2.modeling import DatasetMapperTTA
from detectron2.solver import WarmupParamScheduler
from fvcore.common.param_scheduler import CosineParamScheduler
from omegaconf import OmegaConf

from backbones import FAMILIES
from dense.detection import PyramidBackbone
from dense.detection.cascade import PaperCascadeROIHeads, mask_heads
from dense.detection.mapper import PhotoMapper
from dense.optim import param_groups
from tests.support import MISSING, differences

from .test_configs import FULL_SIZE, config, tiny


def plain(cfg) -> dict:
    return OmegaConf.to_container(cfg)


def detectron2s() -> dict:
    """Its Cascade Mask R-CNN of 3x, in the form of a recipe."""
    return {
        "dataloader": plain(get_config("common/data/coco.py").dataloader),
        "lr_multiplier": plain(get_config("common/coco_schedule.py").lr_multiplier_3x),
        "model": plain(get_config("common/models/cascade_rcnn.py").model),
        "optimizer": plain(get_config("common/optim.py").AdamW),
        "train": plain(get_config("common/train.py").train),
    }


RESIZE = dict(max_size=1333, sample_style="choice", _target_=T.ResizeShortestEdge)
# Of every full-size recipe, but for the backbone, what Detectron2's has otherwise.
FULL = {
    **{f"data.{key}": None for key in ("train_json", "train_images", "val_json", "val_images")},
    "data.classes": None,
    "dataloader.train.mapper._target_": PhotoMapper,
    "dataloader.train.mapper.image_format": "RGB",
    "dataloader.train.mapper.recompute_boxes": False,
    "dataloader.test.mapper._target_": PhotoMapper,
    # As in GeneralizedRCNNWithTTA's own defaults.
    "dataloader.tta._target_": DatasetMapperTTA,
    "dataloader.tta.min_sizes": [400, 500, 600, 700, 800, 900, 1000, 1100, 1200],
    "dataloader.tta.max_size": 4000,
    "dataloader.tta.flip": True,
    "dataloader.evaluator.output_dir": "${train.output_dir}/inference",
    "lr_multiplier.scheduler.milestones": [27, 33, 36],
    "lr_multiplier.warmup_length": pytest.approx(500 / 263_848),
    # Linear is its default.
    "lr_multiplier.warmup_method": MISSING,
    "optimizer.weight_decay": 0.05,
    "optimizer.params._target_": param_groups,
    "optimizer.params.layer_decay": 1.0,
    "optimizer.params.weight_decay_norm": MISSING,
    "train.max_iter": 263_848,
    "train.amp.enabled": True,
    "train.amp.precision": "float16",
    "train.checkpointer.period": 7329,
    "train.checkpointer.max_to_keep": 5,
    "train.eval_period": 3 * 7329,
    "train.seed": -1,
    "model.input_format": "RGB",
    "model.pixel_mean": [123.675, 116.28, 103.53],
    "model.pixel_std": [58.395, 57.12, 57.375],
    "model.proposal_generator.head.in_channels": "${model.backbone.out_channels}",
    "model.proposal_generator.post_nms_topk": [2000, 1000],
    "model.proposal_generator.anchor_boundary_thresh": 0,
    "model.proposal_generator.smooth_l1_beta": pytest.approx(1 / 9),
    "model.roi_heads._target_": PaperCascadeROIHeads,
    "model.roi_heads.stage_loss_weights": [1.0, 0.5, 0.25],
    "model.roi_heads.shared_heads": True,
    "model.roi_heads.mask_head._target_": mask_heads,
    "model.roi_heads.mask_head.shared": "${model.roi_heads.shared_heads}",
    "model.roi_heads.mask_head.input_shape.channels": "${model.backbone.out_channels}",
}
for i in range(3):
    head, predictor = f"model.roi_heads.box_heads.{i}", f"model.roi_heads.box_predictors.{i}"
    FULL |= {
        f"{head}.input_shape.channels": "${model.backbone.out_channels}",
        f"{head}.conv_dims": [256] * 4,
        f"{head}.fc_dims": [1024],
        f"{head}.conv_norm": "SyncBN",
        f"{predictor}.cls_agnostic_bbox_reg": "${model.roi_heads.shared_heads}",
        f"{predictor}.box_reg_loss_type": "giou",
        f"{predictor}.loss_weight.loss_cls": 1.0,
        f"{predictor}.loss_weight.loss_box_reg": 10.0,
        f"{predictor}.num_classes": "${model.roi_heads.num_classes}",
        # Unknown there, and unread.
        f"{predictor}.input_shape.height": MISSING,
        f"{predictor}.input_shape.width": MISSING,
    }
# MMDetection's deviations 0.033 and 0.067, where Detectron2 has a thirtieth and a fifteenth.
FULL["model.roi_heads.box_predictors.2.box2box_transform.weights"] = pytest.approx(
    [1 / 0.033, 1 / 0.033, 1 / 0.067, 1 / 0.067]
)


@pytest.mark.parametrize("name", FULL_SIZE)
def test_full_size_is_detectron2s_but_for_this(name):
    ours = plain(config(name))
    found = differences(
        ours, detectron2s(), "model.backbone.bottom_up.", "dataloader.train.mapper.augmentations."
    )
    # A shape is an object there, settings here, and its stride is unread.
    ends = ("input_shape._target_", "input_shape.stride")
    assert {key: value for key, value in found.items() if not key.endswith(ends)} == FULL
    backbone = ours["model"]["backbone"]["bottom_up"]
    assert set(backbone) == {
        *("_target_", "name", "init", "out_features", "drop_path_rate", "frozen_stages", "norm"),
        *("grad_checkpointing", "window_size", "fuse"),
    }
    assert backbone["window_size"] is None and backbone["_target_"] is PyramidBackbone


@pytest.mark.parametrize("family", FAMILIES)
def test_what_nano_has_otherwise(family):
    """A pyramid of 48 channels, anchors and photos of a fifth of the size, no crops."""
    small = plain(config(f"cascade_mask_rcnn_{family}_nano.py"))
    found = differences(
        small, plain(tiny()), "dataloader.train.mapper.augmentations.", "lr_multiplier."
    )
    heads = [f"model.roi_heads.box_{part}s" for part in ("head", "predictor")]
    expected = {
        "model.backbone.bottom_up.name": f"{family}_nano",
        "model.backbone.bottom_up.init": None,
        "model.backbone.bottom_up.drop_path_rate": 0.0,
        "model.backbone.out_channels": 48,
        "model.proposal_generator.anchor_generator.sizes": [[16], [32], [64], [96], [128]],
        "model.proposal_generator.batch_size_per_image": 64,
        "model.proposal_generator.pre_nms_topk": [300, 300],
        "model.proposal_generator.post_nms_topk": [100, 100],
        "model.proposal_generator.anchor_boundary_thresh": -1,
        "model.roi_heads.batch_size_per_image": 32,
        "model.roi_heads.mask_head.conv_dims": [48] * 4,
        **{f"{heads[0]}.{i}.conv_dims": [48, 48] for i in range(3)},
        **{f"{heads[0]}.{i}.fc_dims": [128] for i in range(3)},
        **{f"{heads[1]}.{i}.input_shape.channels": 128 for i in range(3)},
        "dataloader.train.total_batch_size": 4,
        "dataloader.train.num_workers": 2,
        "dataloader.test.num_workers": 2,
        "dataloader.test.mapper.augmentations.0.short_edge_length": 160,
        "dataloader.test.mapper.augmentations.0.max_size": 256,
        "dataloader.tta.min_sizes": [128, 160, 192],
        "dataloader.tta.max_size": 320,
        "optimizer.lr": 2e-3,
        "train.max_iter": 640,
        "train.amp.enabled": False,
        "train.checkpointer.period": 160,
        "train.checkpointer.max_to_keep": 3,
        "train.eval_period": 0,
    }
    assert found == expected
    assert small["dataloader"]["train"]["mapper"]["augmentations"] == [
        dict(horizontal=True, _target_=T.RandomFlip),
        dict(RESIZE, short_edge_length=[128, 144, 160, 176], max_size=256),
    ]
    cosine = dict(start_value=1.0, end_value=0.01, _target_=CosineParamScheduler)
    assert small["lr_multiplier"] == dict(
        scheduler=cosine, warmup_length=0.05, warmup_factor=0.01, _target_=WarmupParamScheduler
    )
