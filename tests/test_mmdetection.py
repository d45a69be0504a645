"""MMDetection's Cascade Mask R-CNN on our backbones: the paper's counts, names, steps, sizes."""

import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision

pytest.importorskip("mmdet", reason="MMDetection is not installed")

import mmengine
from mmdet.registry import MODELS, TRANSFORMS
from mmdet.structures import DetDataSample
from mmdet.structures.mask import BitmapMasks
from mmengine.config import Config
from mmengine.registry import init_default_scope
from mmengine.structures import InstanceData
from torch import nn

import dense.openmmlab.runner  # noqa: F401
import dense.segmentation  # noqa: F401
from backbones import FAMILIES
from dense.backbone import DenseBackbone, revert_sync_batchnorm
from dense.recipes import RECIPES
from tests.support import foreign_operators, run_python, run_without

CONFIGS = RECIPES / "mmdetection"
RECIPE = "fpn_8xb2-amp-ms-crop-3x_coco"
FULL_SIZE = sorted(path.stem for path in CONFIGS.glob(f"*{RECIPE}.py"))
NANO = "cascade-mask-rcnn_i_d_dw_conv_nano_fpn"


def config(name, **backbone):
    cfg = Config.fromfile(CONFIGS / f"{name}.py")
    cfg.model.backbone.update(init=None, **backbone)
    return cfg


def build(cfg, device="cpu"):
    init_default_scope("mmdet")
    torch.manual_seed(0)
    with torch.device(device):
        return MODELS.build(cfg.model)


def sample(height, width, seed=0):
    """An image of two rectangles as ``(3, H, W)`` uint8 BGR, and what is on it."""
    rng = np.random.default_rng(seed)
    boxes = np.array([[4, 6, width // 2, height - 8], [width // 3, 10, width - 5, height // 2]])
    masks = np.zeros((2, height, width), np.uint8)
    for mask, (left, top, right, bottom) in zip(masks, boxes, strict=True):
        mask[top:bottom, left:right] = 1
    truth = InstanceData(
        bboxes=torch.tensor(boxes, dtype=torch.float32),
        labels=torch.tensor([3, 7]),
        masks=BitmapMasks(masks, height, width),
    )
    meta = dict(img_id=seed, img_shape=(height, width), ori_shape=(height, width))
    data = DetDataSample(metainfo=dict(**meta, scale_factor=(1.0, 1.0)), gt_instances=truth)
    image = torch.from_numpy(rng.integers(0, 255, (3, height, width), dtype=np.uint8))
    return image, data


def batch(*sizes):
    images, data = zip(*(sample(*size, seed=i) for i, size in enumerate(sizes)), strict=True)
    return dict(inputs=list(images), data_samples=list(data))


def test_there_is_a_config_for_every_family_and_size():
    expected = {NANO}
    for family in FAMILIES:
        for size in ("tiny", "base", "base-in22k-pre"):
            expected.add(f"cascade-mask-rcnn_{family}_{size}_{RECIPE}")
    assert {path.stem for path in CONFIGS.glob("*.py")} == expected


@pytest.mark.parametrize("name", FULL_SIZE)
def test_backbone_of_full_size(name, expected_init):
    """That the whole has the paper's parameters, tests/test_complexity.py asks."""
    model = Config.fromfile(CONFIGS / f"{name}.py").model
    backbone = model.backbone
    assert name.startswith(f"cascade-mask-rcnn_{backbone.type}")
    pretraining = "in22k" if "in22k" in name else "in1k"
    assert backbone.init == expected_init(backbone.type, pretraining)
    tiny = "_tiny" in name
    assert backbone.drop_path_rate == (0.2 if tiny else 0.3)
    assert model.neck.in_channels == [(96 if tiny else 128) * 2**i for i in range(4)]
    assert backbone.norm == "SyncBN"
    assert (backbone.out_indices, backbone.frozen_stages) == ((0, 1, 2, 3), -1)


def assert_has(cfg, **figures):
    """That the config has these figures, given by its dotted keys with ``__`` for the dots."""
    for key, figure in figures.items():
        found = cfg
        for part in key.split("__"):
            found = found[int(part) if part.isdigit() else part]
        assert found == figure, (key, found)


# The figures below are those of the authors' cascade_mask_rcnn_dwnet_*_coco.py and of its bases,
# which are Swin's: models/cascade_mask_rcnn_*_fpn.py, datasets/coco_instance.py,
# schedules/schedule_1x.py and default_runtime.py.


@pytest.mark.parametrize("size", ["tiny", "base"])
def test_recipe_of_the_model(size):
    model = Config.fromfile(CONFIGS / f"cascade-mask-rcnn_dw_conv_{size}_{RECIPE}.py").model
    assert_has(
        model,
        type="CascadeRCNN",
        data_preprocessor__mean=[123.675, 116.28, 103.53],
        data_preprocessor__std=[58.395, 57.12, 57.375],
        data_preprocessor__bgr_to_rgb=True,
        data_preprocessor__pad_mask=True,
        data_preprocessor__pad_size_divisor=32,
        neck__type="FPN",
        neck__out_channels=256,
        neck__num_outs=5,
        roi_head__num_stages=3,
        roi_head__stage_loss_weights=[1, 0.5, 0.25],
        roi_head__mask_head__num_convs=4,
        roi_head__mask_head__in_channels=256,
        roi_head__mask_head__conv_out_channels=256,
        roi_head__mask_head__num_classes=80,
        roi_head__mask_head__loss_mask=dict(
            type="CrossEntropyLoss", use_mask=True, loss_weight=1.0
        ),
    )
    # Padding follows normalisation: its value is 0, the default.
    assert "pad_value" not in model.data_preprocessor
    for kind, side in (("bbox", 7), ("mask", 14)):
        assert_has(
            model.roi_head[f"{kind}_roi_extractor"],
            type="SingleRoIExtractor",
            roi_layer=dict(type="RoIAlign", output_size=side, sampling_ratio=0),
            out_channels=256,
            featmap_strides=[4, 8, 16, 32],
        )
    assert_has(
        model.rpn_head,
        in_channels=256,
        feat_channels=256,
        anchor_generator__scales=[8],
        anchor_generator__ratios=[0.5, 1.0, 2.0],
        anchor_generator__strides=[4, 8, 16, 32, 64],
        bbox_coder__target_means=[0.0] * 4,
        bbox_coder__target_stds=[1.0] * 4,
        loss_cls=dict(type="CrossEntropyLoss", use_sigmoid=True, loss_weight=1.0),
        loss_bbox=dict(type="SmoothL1Loss", beta=1 / 9, loss_weight=1.0),
    )


def test_recipe_of_training_and_test():
    model = Config.fromfile(CONFIGS / f"cascade-mask-rcnn_dw_conv_tiny_{RECIPE}.py").model
    assert_has(
        model.train_cfg.rpn,
        assigner__pos_iou_thr=0.7,
        assigner__neg_iou_thr=0.3,
        assigner__min_pos_iou=0.3,
        assigner__match_low_quality=True,
        assigner__ignore_iof_thr=-1,
        sampler__num=256,
        sampler__pos_fraction=0.5,
        sampler__neg_pos_ub=-1,
        sampler__add_gt_as_proposals=False,
        allowed_border=0,
        pos_weight=-1,
    )
    for proposals, most in ((model.train_cfg.rpn_proposal, 2000), (model.test_cfg.rpn, 1000)):
        assert_has(
            proposals,
            nms_pre=most,
            max_per_img=most,
            nms=dict(type="nms", iou_threshold=0.7),
            min_bbox_size=0,
        )
    for stage, threshold in zip(model.train_cfg.rcnn, (0.5, 0.6, 0.7), strict=True):
        assert_has(
            stage,
            assigner__pos_iou_thr=threshold,
            assigner__neg_iou_thr=threshold,
            assigner__min_pos_iou=threshold,
            assigner__match_low_quality=False,
            assigner__ignore_iof_thr=-1,
            sampler__num=512,
            sampler__pos_fraction=0.25,
            sampler__neg_pos_ub=-1,
            sampler__add_gt_as_proposals=True,
            mask_size=28,
            pos_weight=-1,
        )
    assert_has(
        model.test_cfg.rcnn,
        score_thr=0.05,
        nms=dict(type="nms", iou_threshold=0.5),
        max_per_img=100,
        mask_thr_binary=0.5,
    )


def test_recipe_of_the_run():
    cfg = Config.fromfile(CONFIGS / f"cascade-mask-rcnn_dw_conv_tiny_{RECIPE}.py")
    assert_has(
        cfg,
        optim_wrapper__type="AmpOptimWrapper",
        # tests/dense/test_optim.py has the groups that it makes.
        optim_wrapper__constructor="DenseOptimWrapperConstructor",
        optim_wrapper__optimizer=dict(type="AdamW", lr=1e-4, betas=(0.9, 0.999), weight_decay=0.05),
        param_scheduler__0=dict(
            type="LinearLR", start_factor=0.001, by_epoch=False, begin=0, end=500
        ),
        param_scheduler__1=dict(
            type="MultiStepLR", by_epoch=True, begin=0, end=36, milestones=[27, 33], gamma=0.1
        ),
        # The originals compute AP after each epoch, we after every third.
        train_cfg=dict(type="EpochBasedTrainLoop", max_epochs=36, val_interval=3),
        auto_scale_lr=dict(enable=False, base_batch_size=16),
        default_hooks__checkpoint__interval=1,
        default_hooks__checkpoint__save_best="coco/bbox_mAP",
        val_evaluator__classwise=True,
        val_evaluator__metric=["bbox", "segm"],
        test_evaluator__metric=["bbox", "segm"],
        val_evaluator__ann_file="data/coco/annotations/instances_val2017.json",
        test_evaluator__ann_file="data/coco/annotations/instances_val2017.json",
    )
    assert not {"clip_grad", "accumulative_counts"} & set(cfg.optim_wrapper)


def test_recipe_of_the_data():
    cfg = Config.fromfile(CONFIGS / f"cascade-mask-rcnn_dw_conv_tiny_{RECIPE}.py")
    _, load, flip, choice, pack = cfg.train_dataloader.dataset.pipeline
    assert load == dict(type="LoadAnnotations", with_bbox=True, with_mask=True)
    assert (flip, pack) == (dict(type="RandomFlip", prob=0.5), dict(type="PackDetInputs"))
    scales = [(s, 1333) for s in (480, 512, 544, 576, 608, 640, 672, 704, 736, 768, 800)]
    resize = dict(type="RandomChoiceResize", scales=scales, keep_ratio=True)
    small = dict(resize, scales=[(400, 1333), (500, 1333), (600, 1333)])
    crop = dict(
        type="RandomCrop",
        crop_type="absolute_range",
        crop_size=(384, 600),
        allow_negative_crop=True,
    )
    # Without "prob", both branches are as likely.
    assert choice == dict(type="RandomChoice", transforms=[[resize], [small, crop, resize]])
    assert_has(
        cfg.train_dataloader,
        batch_size=2,
        sampler__shuffle=True,
        batch_sampler__type="AspectRatioBatchSampler",
        dataset__data_root="data/coco/",
        dataset__ann_file="annotations/instances_train2017.json",
        dataset__data_prefix__img="train2017/",
        dataset__filter_cfg=dict(filter_empty_gt=True, min_size=32),
    )
    for loader in (cfg.val_dataloader, cfg.test_dataloader):
        assert_has(
            loader,
            batch_size=1,
            drop_last=False,
            sampler__shuffle=False,
            dataset__data_root="data/coco/",
            dataset__ann_file="annotations/instances_val2017.json",
            dataset__data_prefix__img="val2017/",
            dataset__test_mode=True,
            dataset__pipeline__1=dict(type="Resize", scale=(1333, 800), keep_ratio=True),
        )
        kinds = [step.type for step in loader.dataset.pipeline]
        assert kinds == ["LoadImageFromFile", "Resize", "LoadAnnotations", "PackDetInputs"]


def test_recipe_of_the_box_heads():
    cfg = Config.fromfile(CONFIGS / f"cascade-mask-rcnn_dw_conv_tiny_{RECIPE}.py")
    heads = cfg.model.roi_head.bbox_head
    assert [head.bbox_coder.target_stds for head in heads] == [
        [0.1, 0.1, 0.2, 0.2],
        [0.05, 0.05, 0.1, 0.1],
        [0.033, 0.033, 0.067, 0.067],
    ]
    for head in heads:
        assert_has(
            head,
            type="ConvFCBBoxHead",
            num_shared_convs=4,
            num_shared_fcs=1,
            in_channels=256,
            conv_out_channels=256,
            fc_out_channels=1024,
            roi_feat_size=7,
            num_classes=80,
            bbox_coder__target_means=[0.0] * 4,
            norm_cfg=dict(type="SyncBN", requires_grad=True),
            reg_class_agnostic=False,
            reg_decoded_bbox=True,
            loss_cls=dict(type="CrossEntropyLoss", use_sigmoid=False, loss_weight=1.0),
            loss_bbox=dict(type="GIoULoss", loss_weight=10.0),
        )


def test_names_outside_the_backbone_are_mmdetection_2s():
    """The released files were written by 2.11: nothing of theirs may have another name here."""
    model = build(config(f"cascade-mask-rcnn_dw_conv_tiny_{RECIPE}"), "meta")
    found = {k: tuple(v.shape) for k, v in model.state_dict().items() if k[:9] != "backbone."}
    expected = {}

    def layer(name, *shape, bias=True):
        expected[f"{name}.weight"] = shape
        if bias:
            expected[f"{name}.bias"] = shape[:1]

    for i, channels in enumerate((96, 192, 384, 768)):
        layer(f"neck.lateral_convs.{i}.conv", 256, channels, 1, 1)
        layer(f"neck.fpn_convs.{i}.conv", 256, 256, 3, 3)
    layer("rpn_head.rpn_conv", 256, 256, 3, 3)
    layer("rpn_head.rpn_cls", 3, 256, 1, 1)
    layer("rpn_head.rpn_reg", 12, 256, 1, 1)
    for stage in range(3):
        box, mask = f"roi_head.bbox_head.{stage}", f"roi_head.mask_head.{stage}"
        for i in range(4):
            layer(f"{box}.shared_convs.{i}.conv", 256, 256, 3, 3, bias=False)
            layer(f"{box}.shared_convs.{i}.bn", 256)
            expected[f"{box}.shared_convs.{i}.bn.running_mean"] = (256,)
            expected[f"{box}.shared_convs.{i}.bn.running_var"] = (256,)
            expected[f"{box}.shared_convs.{i}.bn.num_batches_tracked"] = ()
            layer(f"{mask}.convs.{i}.conv", 256, 256, 3, 3)
        layer(f"{box}.shared_fcs.0", 1024, 256 * 7 * 7)
        layer(f"{box}.fc_cls", 81, 1024)
        layer(f"{box}.fc_reg", 320, 1024)
        expected[f"{mask}.upsample.weight"] = (256, 256, 2, 2)
        expected[f"{mask}.upsample.bias"] = (256,)
        layer(f"{mask}.conv_logits", 80, 256, 1, 1)
    assert found == expected


def test_nano_trains_by_iterations():
    expected = dict(type="IterBasedTrainLoop", max_iters=640, val_interval=640)
    assert dict(config(NANO).train_cfg) == expected


def test_nanos_boxes_are_coded_as_cascade_r_cnns():
    """The deviations of the paper's three stages (Cai and Vasconcelos, 2018)."""
    coders = [head.bbox_coder for head in config(NANO).model.roi_head.bbox_head]
    assert [coder.target_means for coder in coders] == [[0.0] * 4] * 3
    stages = (0.1, 0.2), (0.05, 0.1), (0.033, 0.067)
    assert [coder.target_stds for coder in coders] == [[xy, xy, wh, wh] for xy, wh in stages]


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_nano_trains_and_predicts_at_any_size(family):
    cfg = config(NANO, type=f"{family}_nano")
    # Nothing pads here: 75 and 101 reach the pyramid as they are.
    cfg.model.data_preprocessor.pad_size_divisor = 1
    model = revert_sync_batchnorm(build(cfg))
    assert model.train() is model

    data = model.data_preprocessor(batch((75, 101), (75, 101)), training=True)
    assert data["inputs"].shape == (2, 3, 75, 101)
    losses = model(**data, mode="loss")
    loss, _ = model.parse_losses(losses)
    assert math.isfinite(loss.detach())
    assert {"s0.loss_bbox", "s2.loss_mask", "loss_rpn_cls"} <= set(losses)
    loss.backward()
    assert not [n for n, p in model.named_parameters() if p.grad is None]

    assert model.eval() is model
    model.test_cfg.rcnn.score_thr = 0.0
    model.roi_head.test_cfg.score_thr = 0.0
    with torch.no_grad():
        (result,) = model.test_step(batch((75, 101)))
    instances = result.pred_instances
    assert len(instances) > 0 and instances.masks.shape[1:] == (75, 101)
    assert instances.bboxes[:, 2].max() <= 101 and instances.bboxes[:, 3].max() <= 75


def augmented(cfg, model, image, *transforms):
    """The merged detections of an image after the pipeline of the config with other transforms."""
    augment = cfg.tta_pipeline[1]["transforms"]
    pipeline = [TRANSFORMS.build(dict(type="TestTimeAug", transforms=[*transforms, augment[3]]))]
    results = dict(img=image, img_path="", img_id=0, img_shape=image.shape[:2])
    results["ori_shape"] = image.shape[:2]
    for step in pipeline:
        results = step(results)
    tta = MODELS.build(dict(cfg.tta_model, module=model))
    data = {key: [[value] for value in values] for key, values in results.items()}
    with torch.no_grad():
        (found,) = tta.test_step(data)
    return found.pred_instances


@pytest.mark.slow
def test_augmented_boxes_of_a_detector_with_masks():
    """Of one size, the plain ones; of a photo and its mirror image, the mirrored ones of these."""
    cfg = config(NANO, type="dw_conv_nano")
    model = revert_sync_batchnorm(build(cfg)).eval()
    model.test_cfg.rcnn.score_thr = model.roi_head.test_cfg.score_thr = 0.0
    for head in model.roi_head.bbox_head:
        nn.init.normal_(head.fc_cls.weight, std=0.3)
    image = np.random.default_rng(0).integers(0, 255, (96, 128, 3), dtype=np.uint8)
    resize, mirrors, *_ = cfg.tta_pipeline[1]["transforms"]
    assert [step["prob"] for step in mirrors] == [1.0, 0.0]
    size = [dict(resize[0], scale=(128, 96))]
    unmirrored = [dict(type="RandomFlip", prob=0.0)]

    with torch.no_grad():
        data = batch((96, 128))
        data["inputs"] = [torch.from_numpy(image).permute(2, 0, 1)]
        (plain,) = model.test_step(data)
    plain = plain.pred_instances
    found = augmented(cfg, model, image, size, unmirrored)
    assert "masks" in plain and "masks" not in found and model.roi_head.with_mask
    torch.testing.assert_close(found.scores, plain.scores, rtol=0, atol=1e-5)
    torch.testing.assert_close(found.bboxes, plain.bboxes, rtol=0, atol=1e-2)

    found, again = (
        augmented(cfg, model, seen, size, mirrors) for seen in (image, image[:, ::-1].copy())
    )
    assert not torch.equal(found.scores, plain.scores)
    left, top, right, bottom = again.bboxes.unbind(1)
    turned = torch.stack([128 - right, top, 128 - left, bottom], 1)
    distance = torch.cdist(
        torch.cat([found.bboxes, 1e3 * found.scores[:, None]], 1),
        torch.cat([turned, 1e3 * again.scores[:, None]], 1),
        p=torch.inf,
    )
    # NMS may keep either of two boxes with the same score.
    assert (distance.min(1)[0] < 0.1).float().mean() > 0.9


def test_augmentation_has_mmdetections_sizes():
    """Of ``retinanet/retinanet_tta.py``, in its package."""
    import mmdet

    theirs = Config.fromfile(
        Path(mmdet.__file__).parent / ".mim/configs/retinanet/retinanet_tta.py"
    )
    ours = config(f"cascade-mask-rcnn_dw_conv_tiny_{RECIPE}")
    assert ours.tta_model.tta_cfg == theirs.tta_model.tta_cfg
    sizes = [
        [dict(step) for step in cfg.tta_pipeline[1]["transforms"][0]] for cfg in (ours, theirs)
    ]
    assert sizes[0] == sizes[1]


def test_features_are_detectron2s():
    """One network under both frameworks: the same weights give the same maps."""
    pytest.importorskip("detectron2", reason="Detectron2 is not installed")
    from dense.detection import PyramidBackbone

    init_default_scope("mmdet")
    ours = MODELS.build(dict(type="i_d_dw_conv_nano", norm="BN")).eval()
    theirs = PyramidBackbone(name="i_d_dw_conv_nano", norm="BN").eval()
    for module in ours.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_var, 0.5, 2.0)
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(1, 3, 70, 99)
    with torch.no_grad():
        for map_, other in zip(ours(x), theirs(x).values(), strict=True):
            torch.testing.assert_close(map_, other, rtol=0, atol=0)


def with_maps_laid_out(monkeypatch, memory_format):
    """Lets the pyramid, before the adapter, hand out maps of one memory layout."""
    forward = DenseBackbone.forward
    monkeypatch.setattr(
        DenseBackbone,
        "forward",
        lambda self, x: tuple(m.contiguous(memory_format=memory_format) for m in forward(self, x)),
    )


LAYOUTS = pytest.mark.parametrize(
    "memory_format", [torch.channels_last, torch.contiguous_format], ids=["NHWC", "NCHW"]
)


@LAYOUTS
def test_roi_features_are_torchvisions(monkeypatch, memory_format):
    """Compiled mmcv misread channels-last maps without a word (open-mmlab/mmcv#2203)."""
    with_maps_laid_out(monkeypatch, memory_format)
    model = revert_sync_batchnorm(build(config(NANO))).train()
    images = torch.randn(2, 3, 96, 128)
    corners = torch.rand(64, 2) * torch.tensor([100.0, 70.0])
    images_of = torch.randint(2, (64, 1)).float()
    rois = torch.cat([images_of, corners, corners + 1 + 60 * torch.rand(64, 2) ** 2], 1)
    extractors = [*model.roi_head.bbox_roi_extractor, *model.roi_head.mask_roi_extractor]
    parameters = dict(model.backbone.named_parameters()) | dict(model.neck.named_parameters())

    def features_and_gradients(of):
        maps = model.extract_feat(images)
        features = torch.cat([of(extractor, maps).flatten() for extractor in extractors])
        loss = (features * torch.linspace(-1, 1, len(features))).sum()
        return features, torch.autograd.grad(loss, parameters.values(), allow_unused=True)

    def torchvisions(extractor, maps):
        maps = maps[: extractor.num_inputs]
        out = maps[0].new_zeros(
            len(rois), extractor.out_channels, *extractor.roi_layers[0].output_size
        )
        levels = extractor.map_roi_levels(rois, len(maps))
        assert len(levels.unique()) > 1
        for i, (map_, layer) in enumerate(zip(maps, extractor.roi_layers, strict=True)):
            out[levels == i] = torchvision.ops.roi_align(
                map_.clone(memory_format=torch.contiguous_format),
                rois[levels == i],
                layer.output_size,
                layer.spatial_scale,
                max(layer.sampling_ratio, 0),
                layer.aligned,
            )
        return out

    ours, gradients = features_and_gradients(lambda extractor, maps: extractor(maps[:4], rois))
    theirs, expected = features_and_gradients(torchvisions)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    for name, gradient, reference in zip(parameters, gradients, expected, strict=True):
        assert (gradient is None) == (reference is None), name
        if gradient is not None:
            error = (gradient - reference).abs().max() / reference.abs().max().clamp(min=1e-6)
            assert error < 1e-3, name


@pytest.mark.slow
@LAYOUTS
@pytest.mark.parametrize("family", FAMILIES)
def test_every_head_is_given_contiguous_maps(monkeypatch, family, memory_format):
    with_maps_laid_out(monkeypatch, memory_format)
    model = revert_sync_batchnorm(build(config(NANO, type=f"{family}_nano"))).train()
    data = model.data_preprocessor(batch((75, 101), (96, 64)), training=True)
    with foreign_operators() as seen:
        losses = model(**data, mode="loss")
        model.parse_losses(losses)[0].backward()
        assert {"mmcv::nms", "mmcv::roi_align_forward", "mmcv::roi_align_backward"} <= seen
        seen.clear()
        model.eval().test_cfg.rcnn.score_thr = 0.0
        with torch.no_grad():
            model.test_step(batch((75, 101)))
        assert {"mmcv::nms", "mmcv::roi_align_forward"} <= seen


def test_a_map_of_one_position_has_contiguous_strides():
    """``contiguous()`` leaves channels-last strides there, which layers behind it would keep."""
    init_default_scope("mmdet")
    backbone = MODELS.build(dict(type="dw_conv_nano", norm="BN")).eval()
    for out in backbone(torch.randn(2, 3, 32, 32)):
        assert out.stride() == torch.empty(out.shape).stride()


@pytest.mark.slow
def test_mmsegmentation_and_detectron2_are_not_needed():
    code = (
        "from mmengine.config import Config\n"
        "from mmengine.registry import init_default_scope\n"
        "from mmdet.registry import MODELS\n"
        f"cfg = Config.fromfile('configs/mmdetection/{NANO}.py')\n"
        "init_default_scope(cfg.default_scope)\n"
        "print(type(MODELS.build(cfg.model).backbone).__name__)\n"
    )
    done = run_without(("mmseg", "detectron2"), code)
    assert done.returncode == 0, done.stderr
    assert re.search(r"OpenMMLabBackbone\s*$", done.stdout)


def mmdetection(tool, *arguments):
    import mmdet

    path = Path(mmdet.__file__).parent / ".mim/tools" / f"{tool}.py"
    done = run_python("-W", "ignore", path, *arguments)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout + done.stderr


@pytest.mark.e2e
def test_mmdetections_own_tools_train_resume_and_test(tmp_path, sample_data):
    """On a slice of COCO; then the weights under the names of the authors' released files."""
    from backbones.layouts import LAYOUTS, from_ours
    from dense.openmmlab import checkpoints

    root, annotations = f"{sample_data}/coco/", f"{sample_data}/coco/annotations"
    own = CONFIGS / f"{NANO}.py"
    options = [
        "--cfg-options",
        "model.backbone.type=d_dw_conv_nano",
        "model.test_cfg.rcnn.score_thr=0.0",
        *(f"{split}_dataloader.dataset.data_root={root}" for split in ("train", "val", "test")),
        *(
            f"{split}_evaluator.ann_file={annotations}/instances_val2017.json"
            for split in ("val", "test")
        ),
        "val_dataloader.dataset.indices=12",
        "test_dataloader.dataset.indices=12",
        "default_hooks.checkpoint.interval=2",
        "default_hooks.logger.interval=1",
    ]
    run = ("train", own, "--work-dir", tmp_path)
    first = mmdetection(*run, *options, "train_cfg.max_iters=2", "train_cfg.val_interval=10")
    said = mmdetection(
        *run, "--resume", *options, "train_cfg.max_iters=4", "train_cfg.val_interval=4"
    )
    assert "iter_2.pth" in said and "Iter(train) [4/4]" in said and "[1/4]" not in said
    assert "coco/segm_mAP" in said and "| category" in said
    # Both trainings end with a validation; of equal ones the first is the best.
    before, after = (float(re.findall(r"coco/bbox_mAP: ([-.\d]+)", s)[-1]) for s in (first, said))
    (best,) = tmp_path.glob("best_*.pth")
    assert best.name == f"best_coco_bbox_mAP_iter_{4 if after > before else 2}.pth"

    weights = checkpoints.read(tmp_path / "iter_4.pth")["state_dict"]
    inner = {k[9:]: v for k, v in weights.items() if k.startswith("backbone.")}
    released = {k: v for k, v in weights.items() if not k.startswith("backbone.")}
    renamed = from_ours(inner, LAYOUTS["original"])
    assert "layers.0.blocks.0.attn2conv.conv.conv1.weight" in renamed
    released |= {f"backbone.{k}": v for k, v in renamed.items()}
    torch.save({"state_dict": released, "meta": {"epoch": 36}}, tmp_path / "released.pth")
    figures, found = [], []
    for file in ("iter_4.pth", "released.pth"):
        out = tmp_path / "found.pkl"
        test = ("test", own, tmp_path / file, "--work-dir", tmp_path / "test", "--out", out)
        figures.append(re.findall(r"coco/\w+_mAP\w*: [-.\d]+", mmdetection(*test, *options)))
        found.append([image["pred_instances"] for image in mmengine.load(out)])
    assert figures[0] == figures[1] and len(figures[0]) == 12
    # Two iterations leave all figures at 0: the boxes themselves.
    assert len(found[0]) == 12 and sum(len(instances["scores"]) for instances in found[0]) > 0
    for ours, theirs in zip(*found, strict=True):
        assert ours["bboxes"].equal(theirs["bboxes"]) and ours["scores"].equal(theirs["scores"])
    augmented = [*options, "test_evaluator.metric=bbox"]
    test = ("test", own, tmp_path / "iter_4.pth", "--work-dir", tmp_path / "test")
    assert "coco/bbox_mAP: " in mmdetection(*test, "--tta", *augmented)
