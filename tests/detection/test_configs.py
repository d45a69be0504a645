"""The recipes: every network at full size, every number of the paper's, and a step of each."""

import math

import detectron2.data.transforms as T
import numpy as np
import pytest
import torch
from detectron2.config import instantiate
from detectron2.solver import LRMultiplier
from torch import nn

from backbones import FAMILIES
from dense.analysis.paper import TABLE_3_DETECTION
from dense.backbone import revert_sync_batchnorm
from dense.detection import PyramidBackbone
from dense.detection.config import load_config
from dense.recipes import RECIPES

from .steps import eval_step, sample, train_step

CONFIGS = RECIPES / "detection"
FULL_SIZE = sorted(p.name for p in CONFIGS.glob("*_coco.py"))
# What MMDetection's cascade, the paper's, has and Detectron2's has not.
TWO_MORE_MASK_HEADS, CLASS_SPECIFIC_BOXES = 5.29, 0.97


def config(name: str):
    return load_config(str(CONFIGS / name))


def test_there_is_a_config_for_every_family_and_size():
    names = {f"cascade_mask_rcnn_{f}_{s}_3x_coco.py" for f in FAMILIES for s in ("tiny", "base")}
    names |= {f"cascade_mask_rcnn_{f}_base_in22k_3x_coco.py" for f in FAMILIES}
    names |= {f"cascade_mask_rcnn_{f}_nano.py" for f in FAMILIES}
    assert {p.name for p in CONFIGS.glob("*.py")} == names


@pytest.mark.parametrize("name", FULL_SIZE)
def test_full_size_has_the_papers_parameters(name):
    cfg = config(name)
    with torch.device("meta"):
        model = instantiate(cfg.model)
    backbone = cfg.model.backbone.bottom_up.name
    ours = sum(p.numel() for p in model.parameters()) / 1e6
    published = TABLE_3_DETECTION.get(backbone)
    theirs = ours + TWO_MORE_MASK_HEADS + CLASS_SPECIFIC_BOXES
    assert isinstance(model.backbone.bottom_up, PyramidBackbone)
    assert backbone in name.replace("_in22k", "")
    assert published is None or round(theirs) == published.parameters


def test_the_two_differences_from_the_papers_heads():
    with torch.device("meta"):
        heads = instantiate(config("cascade_mask_rcnn_swin_tiny_3x_coco.py").model).roi_heads
    mask = sum(p.numel() for p in heads.mask_head.parameters())
    assert 2 * mask / 1e6 == pytest.approx(TWO_MORE_MASK_HEADS, abs=0.01)
    boxes = 3 * (80 - 1) * 4 * (1024 + 1)
    assert boxes / 1e6 == pytest.approx(CLASS_SPECIFIC_BOXES, abs=0.01)


@pytest.mark.parametrize("name", FULL_SIZE)
def test_recipe_of_the_backbone(name, expected_init):
    backbone = config(name).model.backbone.bottom_up
    assert backbone.drop_path_rate == (0.2 if "_tiny" in name else 0.3)
    assert backbone.norm == "SyncBN"
    assert backbone.frozen_stages == -1
    pretraining = "in22k" if "in22k" in name else "in1k"
    assert backbone.init == expected_init(backbone.name, pretraining)


def test_recipe_of_the_model():
    with torch.device("meta"):
        model = instantiate(config("cascade_mask_rcnn_dw_conv_tiny_3x_coco.py").model)
    assert model.input_format == "RGB"
    assert model.backbone.output_shape()["p2"].channels == 256
    heads = model.roi_heads
    assert heads.num_classes == 80
    assert heads.num_cascade_stages == 3
    for head, predictor in zip(heads.box_head, heads.box_predictor, strict=True):
        convolutions = [m for m in head.modules() if isinstance(m, nn.Conv2d)]
        assert [c.out_channels for c in convolutions] == [256] * 4
        assert all(isinstance(c.norm, nn.SyncBatchNorm) for c in convolutions)
        assert [m.out_features for m in head.modules() if isinstance(m, nn.Linear)] == [1024]
        assert predictor.box_reg_loss_type == "giou"
        assert predictor.loss_weight == {"loss_cls": 1.0, "loss_box_reg": 10.0}
    assert [m.thresholds[1] for m in heads.proposal_matchers] == [0.5, 0.6, 0.7]
    convolutions = [m for m in heads.mask_head.modules() if type(m).__name__ == "Conv2d"]
    assert [c.kernel_size for c in convolutions] == [(3, 3)] * 4 + [(1, 1)]


def test_recipe_of_the_schedule():
    cfg = config("cascade_mask_rcnn_dw_conv_tiny_3x_coco.py")
    images, batch, epochs = 117266, 16, 36
    assert cfg.dataloader.train.total_batch_size == batch
    assert cfg.train.max_iter == images * epochs // batch
    assert cfg.train.amp.enabled
    multiplier = instantiate(cfg.lr_multiplier)
    weight = nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.AdamW([weight], lr=cfg.optimizer.lr)
    assert LRMultiplier(optimizer, multiplier, cfg.train.max_iter).get_lr() == [pytest.approx(1e-7)]
    for epoch, lr in ((1, 1e-4), (26.99, 1e-4), (27.01, 1e-5), (32.99, 1e-5), (33.01, 1e-6)):
        assert cfg.optimizer.lr * multiplier(epoch / epochs) == pytest.approx(lr)


@pytest.mark.parametrize("family", FAMILIES)
def test_no_decay_on_norms_and_position_bias_tables_alone(family):
    cfg = config(f"cascade_mask_rcnn_{family}_tiny_3x_coco.py")
    with torch.device("meta"):
        model = instantiate(cfg.model)
    cfg.optimizer.params.model = model
    optimizer = instantiate(cfg.optimizer)
    assert type(optimizer) is torch.optim.AdamW
    assert {g["lr"] for g in optimizer.param_groups} == {1e-4}
    decay = {id(p): g["weight_decay"] for g in optimizer.param_groups for p in g["params"]}

    norms = (nn.LayerNorm, nn.modules.batchnorm._BatchNorm)
    exempt = {id(p) for m in model.modules() if isinstance(m, norms) for p in m.parameters()}
    exempt |= {
        id(p) for n, p in model.named_parameters() if n.endswith("relative_position_bias_table")
    }
    assert any("norm" in n for n, _ in model.named_parameters())
    for name, parameter in model.named_parameters():
        assert decay[id(parameter)] == (0.0 if id(parameter) in exempt else 0.05), name


def augmented(augmentations, image, tries=60):
    augmentation = T.AugmentationList(instantiate(augmentations))
    for _ in range(tries):
        seen = T.AugInput(image)
        yield augmentation(seen), seen.image


def test_scales_and_the_crop_branch():
    np.random.seed(0)
    cfg = config("cascade_mask_rcnn_dw_conv_tiny_3x_coco.py")
    cropped, flipped = 0, 0
    for transforms, image in augmented(
        cfg.dataloader.train.mapper.augmentations, np.zeros((60, 90, 3), np.uint8)
    ):
        assert min(image.shape[:2]) in range(480, 801, 32) or max(image.shape[:2]) == 1333
        assert max(image.shape[:2]) <= 1333
        crops = [t for t in transforms if isinstance(t, T.CropTransform)]
        resizes = [t for t in transforms if isinstance(t, T.ResizeTransform)]
        assert len(resizes) == 1 + len(crops)
        if crops:
            assert min(resizes[0].new_h, resizes[0].new_w) in (400, 500, 600)
            assert 384 <= crops[0].h <= min(resizes[0].new_h, 600)
            assert 384 <= crops[0].w <= min(resizes[0].new_w, 600)
            assert (resizes[1].h, resizes[1].w) == (crops[0].h, crops[0].w)
        cropped += bool(crops)
        flipped += any(isinstance(t, T.HFlipTransform) for t in transforms)
    assert 15 < cropped < 45
    assert 15 < flipped < 45


def test_evaluation_is_at_800():
    cfg = config("cascade_mask_rcnn_dw_conv_tiny_3x_coco.py")
    augmentations = cfg.dataloader.test.mapper.augmentations
    _, image = next(augmented(augmentations, np.zeros((60, 90, 3), np.uint8)))
    assert image.shape[:2] == (800, 1200)
    _, image = next(augmented(augmentations, np.zeros((60, 190, 3), np.uint8)))
    assert image.shape[:2] == (421, 1333)
    assert cfg.dataloader.test.mapper.image_format == "RGB"


@pytest.mark.parametrize("family", FAMILIES)
def test_nano_twin_trains_and_evaluates(family):
    torch.manual_seed(0)
    model = revert_sync_batchnorm(instantiate(config(f"cascade_mask_rcnn_{family}_nano.py").model))
    batch = sample(count=2)
    assert math.isfinite(train_step(model, batch))
    assert not [n for n, p in model.named_parameters() if p.grad is None]
    assert eval_step(model, batch).has("pred_boxes")


@pytest.mark.e2e
@pytest.mark.parametrize("family", FAMILIES)
def test_tiny_trains_and_evaluates(family):
    torch.manual_seed(0)
    cfg = config(f"cascade_mask_rcnn_{family}_tiny_3x_coco.py")
    cfg.model.backbone.bottom_up.init = None
    cfg.model.roi_heads.batch_size_per_image = 16
    cfg.model.proposal_generator.post_nms_topk = (64, 32)
    model = revert_sync_batchnorm(instantiate(cfg.model))
    batch = sample()
    assert math.isfinite(train_step(model, batch))
    assert eval_step(model, batch).has("pred_boxes")
