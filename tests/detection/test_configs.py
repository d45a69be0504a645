"""The recipes: every network at full size, every number of the paper's, and a step of each."""

import importlib.util
import math

import detectron2.data.transforms as T
import numpy as np
import pytest
import torch
from detectron2.config import instantiate
from detectron2.solver import LRMultiplier
from omegaconf import OmegaConf
from torch import nn

from backbones import FAMILIES
from dense.analysis import complexity
from dense.analysis.paper import TABLE_3_DETECTION
from dense.backbone import revert_sync_batchnorm
from dense.detection import PyramidBackbone
from dense.detection.config import load_config
from dense.recipes import RECIPES
from tests.support import flat, recipes

from .steps import eval_step, sample, train_step

CONFIGS = RECIPES / "detection"
FULL_SIZE = sorted(p.name for p in CONFIGS.glob("*_coco.py"))
# What MMDetection's cascade, the paper's, has and Detectron2's has not.
TWO_MORE_MASK_HEADS, CLASS_SPECIFIC_BOXES = 5.29, 0.97


# The paper's figures for Swin tiny, in millions and billions.
SWIN_TINY_PARAMETERS, SWIN_TINY_FLOPS = 86, 747


def config(name: str, *overrides: str):
    return load_config(str(CONFIGS / name), overrides)


def tiny(*overrides: str):
    return config("cascade_mask_rcnn_dw_conv_tiny_3x_coco.py", *overrides)


def test_there_is_a_config_for_every_family_and_size():
    names = {f"cascade_mask_rcnn_{f}_{s}_3x_coco.py" for f in FAMILIES for s in ("tiny", "base")}
    names |= {f"cascade_mask_rcnn_{f}_base_in22k_3x_coco.py" for f in FAMILIES}
    names |= {f"cascade_mask_rcnn_{f}_nano.py" for f in FAMILIES}
    assert {p.name for p in CONFIGS.glob("*.py")} == names


@pytest.mark.parametrize("path", recipes(CONFIGS), ids=lambda path: path.stem)
def test_a_recipe_is_plain_data(path):
    """What an option cannot reach, and no YAML can hold, would be an object in its place."""
    leaves = flat(OmegaConf.to_container(config(str(path.relative_to(CONFIGS)))))
    plain = str, int, float, tuple, list, type(None)
    odd = {key for key, value in leaves.items() if not isinstance(value, plain)}
    assert {key for key in odd if not key.endswith("_target_")} == set()


@pytest.mark.slow
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


@pytest.mark.slow
@pytest.mark.parametrize("name", FULL_SIZE)
def test_the_papers_heads_are_an_option(name):
    """With them, parameters are the paper's, and to the last one MMDetection's."""
    cfg = config(name, "model.roi_heads.shared_heads=false")
    with torch.device("meta"):
        parameters = complexity.parameters(instantiate(cfg.model))
    backbone = cfg.model.backbone.bottom_up.name
    if backbone in TABLE_3_DETECTION:
        assert round(parameters / 1e6) == TABLE_3_DETECTION[backbone].parameters
    if backbone == "swin_tiny":
        assert round(parameters / 1e6) == SWIN_TINY_PARAMETERS
    if importlib.util.find_spec("mmdet"):
        other = complexity.mmdet_detector(mmdetections(backbone), with_flops=False)
        assert parameters == other.parameters


def mmdetections(backbone: str):
    recipe = "fpn_8xb2-amp-ms-crop-3x_coco"
    return RECIPES / f"mmdetection/cascade-mask-rcnn_{backbone}_{recipe}.py"


def flops_of_heads(cfg) -> int:
    with torch.device("meta"):
        heads = revert_sync_batchnorm(instantiate(cfg.model).roi_heads)
    masks = [heads.mask_head] if heads.shared_heads else heads.mask_head
    boxes = zip(heads.box_head, heads.box_predictor, strict=True)
    count = sum(complexity.flops(nn.Sequential(*pair), (1000, 256, 7, 7)) for pair in boxes)
    layers = (nn.Sequential(*head.children()) for head in masks)
    return count + sum(complexity.flops(head, (100, 256, 14, 14)) for head in layers)


@pytest.mark.e2e
def test_flops_with_the_papers_heads_are_the_papers():
    pytest.importorskip("mmdet", reason="MMDetection is not installed")
    name = "cascade_mask_rcnn_swin_tiny_3x_coco.py"
    count = complexity.detectron2_detector(CONFIGS / name)[0].flops
    count += flops_of_heads(config(name, "model.roi_heads.shared_heads=false"))
    count -= flops_of_heads(config(name))
    assert count == complexity.mmdet_detector(mmdetections("swin_tiny")).flops
    assert count / 1e9 == pytest.approx(SWIN_TINY_FLOPS, rel=0.005)


@pytest.mark.parametrize("name", FULL_SIZE)
def test_recipe_of_the_backbone(name, expected_init):
    backbone = config(name).model.backbone.bottom_up
    assert backbone.drop_path_rate == (0.2 if "_tiny" in name else 0.3)
    assert backbone.norm == "SyncBN"
    assert backbone.frozen_stages == -1
    assert backbone.out_features == ["res2", "res3", "res4", "res5"]
    assert not backbone.fuse and not backbone.grad_checkpointing
    pretraining = "in22k" if "in22k" in name else "in1k"
    assert backbone.init == expected_init(backbone.name, pretraining)


# The figures below are those of the authors' cascade_mask_rcnn_dwnet_*_coco.py and of its bases,
# which are Swin's: models/cascade_mask_rcnn_*_fpn.py, datasets/coco_instance.py,
# schedules/schedule_1x.py and default_runtime.py.


@pytest.mark.parametrize("size", ["tiny", "base"])
def test_recipe_of_the_input(size):
    with torch.device("meta"):
        model = instantiate(config(f"cascade_mask_rcnn_dw_conv_{size}_3x_coco.py").model)
    assert model.input_format == "RGB"
    assert model.backbone.size_divisibility == 32
    # Pixels are normalised in this order and padded with 0 afterwards.
    model.pixel_mean, model.pixel_std = (
        torch.tensor(values).view(3, 1, 1)
        for values in (tiny().model.pixel_mean, tiny().model.pixel_std)
    )
    image = torch.tensor([123.675, 116.28 + 57.12, 103.53 - 57.375]).view(3, 1, 1)
    padded = model.preprocess_image([{"image": image.expand(3, 33, 64)}]).tensor
    assert padded.shape == (1, 3, 64, 64)
    expected = torch.tensor([0.0, 1.0, -1.0]).view(3, 1, 1).expand(3, 33, 64)
    torch.testing.assert_close(padded[0, :, :33], expected, atol=1e-5, rtol=0)
    assert not padded[0, :, 33:].any()
    deviation = torch.tensor([123.675 + 58.395, 116.28, 103.53]).view(3, 1, 1).expand(3, 32, 32)
    assert model.preprocess_image([{"image": deviation}]).tensor[0, 0].mean() == pytest.approx(1)


def test_recipe_of_the_rpn():
    with torch.device("meta"):
        model = instantiate(tiny().model)
    rpn = model.proposal_generator
    anchors = rpn.anchor_generator
    assert rpn.rpn_head.objectness_logits.out_channels == 3
    assert rpn.rpn_head.conv.out_channels == 256
    assert rpn.in_features == ["p2", "p3", "p4", "p5", "p6"]
    assert anchors.strides == [4, 8, 16, 32, 64] and anchors.offset == 0.0
    areas, ratios = [], []
    for cells in instantiate(tiny().model.proposal_generator.anchor_generator).cell_anchors:
        sizes = cells[:, 2:] - cells[:, :2]
        areas.append(sizes.prod(1).sqrt().tolist())
        ratios.append((sizes[:, 1] / sizes[:, 0]).tolist())
    # One scale, 8 times the stride.
    assert areas == [pytest.approx([side] * 3) for side in (32, 64, 128, 256, 512)]
    assert ratios == [pytest.approx([0.5, 1.0, 2.0])] * 5
    assert rpn.anchor_matcher.thresholds[1:-1] == [0.3, 0.7]
    assert rpn.anchor_matcher.labels == [0, -1, 1]
    assert rpn.anchor_matcher.allow_low_quality_matches
    assert tuple(rpn.box2box_transform.weights) == (1.0, 1.0, 1.0, 1.0)
    assert (rpn.batch_size_per_image, rpn.positive_fraction) == (256, 0.5)
    assert rpn.anchor_boundary_thresh == 0
    assert rpn.pre_nms_topk == rpn.post_nms_topk == {True: 2000, False: 1000}
    assert (rpn.nms_thresh, rpn.min_box_size) == (0.7, 0)
    assert (rpn.box_reg_loss_type, rpn.smooth_l1_beta) == ("smooth_l1", 1 / 9)
    assert rpn.loss_weight == {"loss_rpn_cls": 1.0, "loss_rpn_loc": 1.0}


def test_recipe_of_the_model():
    with torch.device("meta"):
        model = instantiate(tiny().model)
    levels = model.backbone.output_shape()
    assert {name: (level.channels, level.stride) for name, level in levels.items()} == {
        f"p{i}": (256, 2**i) for i in range(2, 7)
    }
    heads = model.roi_heads
    assert heads.num_classes == 80
    assert heads.num_cascade_stages == 3
    assert heads.stage_loss_weights == [1, 0.5, 0.25]
    assert heads.shared_heads
    assert (heads.batch_size_per_image, heads.positive_fraction) == (512, 0.25)
    assert heads.box_in_features == heads.mask_in_features == ["p2", "p3", "p4", "p5"]
    for pooler, side in ((heads.box_pooler, 7), (heads.mask_pooler, 14)):
        assert pooler.output_size == (side, side)
        for level, stride in zip(pooler.level_poolers, (4, 8, 16, 32), strict=True):
            assert (level.spatial_scale, level.sampling_ratio, level.aligned) == (
                1 / stride,
                0,
                True,
            )
        # A region of 112 pixels is the first of the second level.
        assert (pooler.canonical_level, pooler.canonical_box_size) == (4, 224)
    deviations = ((0.1, 0.2), (0.05, 0.1), (0.033, 0.067))
    for predictor, (centre, size) in zip(heads.box_predictor, deviations, strict=True):
        expected = [1 / centre, 1 / centre, 1 / size, 1 / size]
        assert list(predictor.box2box_transform.weights) == pytest.approx(expected)
        assert predictor.bbox_pred.out_features == 4
        assert predictor.cls_score.out_features == 81
        assert (predictor.test_score_thresh, predictor.test_nms_thresh) == (0.05, 0.5)
        assert predictor.test_topk_per_image == 100
    for matcher in heads.proposal_matchers:
        assert matcher.labels == [0, 1] and not matcher.allow_low_quality_matches
    for head, predictor in zip(heads.box_head, heads.box_predictor, strict=True):
        convolutions = [m for m in head.modules() if isinstance(m, nn.Conv2d)]
        assert [c.out_channels for c in convolutions] == [256] * 4
        assert all(isinstance(c.norm, nn.SyncBatchNorm) for c in convolutions)
        assert [m.out_features for m in head.modules() if isinstance(m, nn.Linear)] == [1024]
        assert predictor.box_reg_loss_type == "giou"
        assert predictor.loss_weight == {"loss_cls": 1.0, "loss_box_reg": 10.0}
    assert [m.thresholds[1:-1] for m in heads.proposal_matchers] == [[0.5], [0.6], [0.7]]
    convolutions = [m for m in heads.mask_head.modules() if type(m).__name__ == "Conv2d"]
    assert [c.kernel_size for c in convolutions] == [(3, 3)] * 4 + [(1, 1)]
    assert [c.out_channels for c in convolutions] == [256] * 4 + [80]
    assert (heads.mask_head.deconv.out_channels, heads.mask_head.loss_weight) == (256, 1.0)


def test_recipe_of_the_papers_heads():
    with torch.device("meta"):
        heads = instantiate(tiny("model.roi_heads.shared_heads=false").model).roi_heads
    assert [p.bbox_pred.out_features for p in heads.box_predictor] == [4 * 80] * 3
    assert len(heads.mask_head) == 3 and not heads.shared_heads


def test_recipe_of_the_schedule():
    cfg = tiny()
    images, batch, epochs = 117266, 16, 36
    assert cfg.dataloader.train.total_batch_size == batch
    assert cfg.train.max_iter == images * epochs // batch
    assert cfg.train.amp.enabled
    assert cfg.optimizer.betas == [0.9, 0.999]
    # A checkpoint each epoch, as the originals; AP is theirs each epoch, here every third.
    assert cfg.train.checkpointer.period == 7329
    assert cfg.train.eval_period == 3 * 7329
    # No clipping of gradients.
    assert cfg.optimizer._target_ is torch.optim.AdamW
    assert "clip" not in str(OmegaConf.to_container(cfg.train))
    multiplier = instantiate(cfg.lr_multiplier)
    weight = nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.AdamW([weight], lr=cfg.optimizer.lr)
    assert LRMultiplier(optimizer, multiplier, cfg.train.max_iter).get_lr() == [pytest.approx(1e-7)]
    # Warm-up is linear, from a thousandth, over 500 iterations.
    for iteration, factor in ((0, 0.001), (125, 0.25075), (250, 0.5005), (375, 0.75025), (500, 1)):
        assert multiplier(iteration / cfg.train.max_iter) == pytest.approx(factor)
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


def test_recipe_of_the_data():
    train, test = tiny().dataloader.train, tiny().dataloader.test
    flip, branch, scale = train.mapper.augmentations
    scales = [480, 512, 544, 576, 608, 640, 672, 704, 736, 768, 800]
    assert instantiate(flip).prob == 0.5
    assert (flip.horizontal, flip.get("vertical", False)) == (True, False)
    assert (scale.short_edge_length, scale.max_size, scale.sample_style) == (scales, 1333, "choice")
    small, crop = branch.tfm_or_aug.augs
    assert branch.prob == 0.5
    assert (small.short_edge_length, small.max_size) == ([400, 500, 600], 1333)
    assert small.sample_style == "choice"
    assert (crop.crop_type, crop.crop_size) == ("absolute_range", [384, 600])
    assert not train.mapper.recompute_boxes and train.mapper.use_instance_mask
    assert train.mapper.is_train and not test.mapper.is_train
    assert train.mapper.image_format == test.mapper.image_format == "RGB"
    assert (train.dataset.names, test.dataset.names) == ("coco_2017_train", "coco_2017_val")
    assert train.dataset.get("filter_empty", True) and not test.dataset.filter_empty


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
@pytest.mark.parametrize("family", ["swin", "d_dw_conv"])
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
