"""Every setting of MMDetection's recipes is of its own configs, or a difference said here."""

from pathlib import Path

import pytest

pytest.importorskip("mmdet", reason="MMDetection is not installed")

import mmdet
from mmengine.config import Config

from backbones import FAMILIES
from dense.recipes import RECIPES
from tests.support import MISSING, differences, flat

CONFIGS = RECIPES / "mmdetection"
PACKAGE = Path(mmdet.__file__).parent / ".mim/configs"
RECIPE = "fpn_8xb2-amp-ms-crop-3x_coco"
FULL_SIZE = sorted(path.stem for path in CONFIGS.glob(f"*{RECIPE}.py"))
NANO = "cascade-mask-rcnn_i_d_dw_conv_nano_fpn"
# MMDetection's config with Swin, where it has one.
THEIRS = {
    "mask-rcnn_fpn_8xb2-1x_coco": "swin/mask-rcnn_swin-t-p4-w7_fpn_1x_coco",
    "mask-rcnn_fpn_8xb2-ms-crop-3x_coco": "swin/mask-rcnn_swin-t-p4-w7_fpn_ms-crop-3x_coco",
    "cascade-mask-rcnn_fpn_8xb2-1x_coco": "cascade_rcnn/cascade-mask-rcnn_r50_fpn_1x_coco",
    "retinanet_fpn_8xb2-1x_coco": "swin/retinanet_swin-t-p4-w7_fpn_1x_coco",
}
SCHEMES = "optim_wrapper.paramwise_cfg.custom_keys"

# What every recipe has otherwise: a runner for the CPU too, the best checkpoint, logs for
# TensorBoard, APs by class, more workers; and what is None there.
OURS = {
    "runner_type": "DenseRunner",
    "custom_hooks.0.type": "StopOnNonFiniteLoss",
    "optim_wrapper.constructor": "DenseOptimWrapperConstructor",
    "default_hooks.checkpoint.max_keep_ckpts": 3,
    "default_hooks.checkpoint.save_best": "coco/bbox_mAP",
    "default_hooks.checkpoint.rule": "greater",
    "vis_backends.1.type": "TensorboardVisBackend",
    "visualizer.vis_backends.1.type": "TensorboardVisBackend",
    "visualizer.name": MISSING,
    "log_processor.type": MISSING,
    "log_processor.window_size": MISSING,
    "tta_model.type": "BoxTTAModel",
    "tta_pipeline.0.backend_args": MISSING,
}
for split in ("train", "val", "test"):
    OURS[f"{split}_dataloader.num_workers"] = 4
    OURS[f"{split}_dataloader.dataset.backend_args"] = MISSING
    OURS[f"{split}_dataloader.dataset.pipeline.0.backend_args"] = MISSING
for evaluator in ("val_evaluator", "test_evaluator"):
    OURS[f"{evaluator}.classwise"] = True
    OURS[f"{evaluator}.format_only"] = MISSING
    OURS[f"{evaluator}.backend_args"] = MISSING
# Norms and tables have no decay here by their types.
BY_NAME = {
    f"{SCHEMES}.{name}.decay_mult": MISSING
    for name in ("absolute_pos_embed", "relative_position_bias_table", "norm")
}
# Those of MMDetection's configs with Swin, in place of SGD.
ADAMW = {
    "optim_wrapper.optimizer.type": "AdamW",
    "optim_wrapper.optimizer.lr": 1e-4,
    "optim_wrapper.optimizer.betas": [0.9, 0.999],
    "optim_wrapper.optimizer.weight_decay": 0.05,
    "optim_wrapper.optimizer.momentum": MISSING,
    "param_scheduler.0.end": 1000,
}
PACKED = ["img_id", "img_path", "ori_shape", "img_shape", "scale_factor", "flip", "flip_direction"]
MODULES = ["dense.segmentation", "dense.openmmlab.hooks", "dense.openmmlab.runner"]
# What is tested beside it, or there twice.
LEFT_OUT = ("model.", "custom_imports.", "resize.", "train_pipeline.", "test_pipeline.")


def ours(name: str) -> dict:
    cfg = Config.fromfile(CONFIGS / f"{name}.py").to_dict()
    for kind, splits in (("train", ("train",)), ("test", ("val", "test"))):
        for split in splits:
            assert cfg[f"{split}_dataloader"]["dataset"]["pipeline"] == cfg[f"{kind}_pipeline"]
    assert cfg["custom_imports"] == dict(imports=[*MODULES, "dense.openmmlab.tta"])
    return cfg


def theirs(name: str) -> dict:
    """With augmentation in tests, which is a file of its own there."""
    paths = (PACKAGE / f"{name}.py", PACKAGE / "retinanet/retinanet_tta.py")
    one, augmentation = (Config.fromfile(path).to_dict() for path in paths)
    return one | augmentation


@pytest.mark.parametrize("name", FULL_SIZE)
def test_full_size(name):
    """Swin's 3x in mixed precision; its authors' warm-up has 500 iterations."""
    found = differences(
        ours(name), theirs("swin/mask-rcnn_swin-t-p4-w7_fpn_amp-ms-crop-3x_coco"), *LEFT_OUT
    )
    later = {"param_scheduler.0.end": 500, "train_cfg.val_interval": 3}
    assert found == OURS | BY_NAME | later


@pytest.mark.parametrize("name", FULL_SIZE)
def test_model_of_full_size(name):
    """Box heads of four convolutions; tests/test_mmdetection.py has backbone and channels."""
    found = differences(
        ours(name)["model"],
        theirs("_base_/models/cascade-mask-rcnn_r50_fpn")["model"],
        *("backbone.", "neck.in_channels"),
    )
    head = {
        "type": "ConvFCBBoxHead",
        "num_shared_convs": 4,
        "num_shared_fcs": 1,
        "conv_out_channels": 256,
        "reg_class_agnostic": False,
        "reg_decoded_bbox": True,
        "norm_cfg.type": "SyncBN",
        "norm_cfg.requires_grad": True,
        "loss_bbox.type": "GIoULoss",
        "loss_bbox.loss_weight": 10.0,
        "loss_bbox.beta": MISSING,
    }
    assert found == {
        f"roi_head.bbox_head.{stage}.{key}": value
        for stage in range(3)
        for key, value in head.items()
    }
    backbone = ours(name)["model"]["backbone"]
    assert set(backbone) == {
        *("type", "init", "out_indices", "frozen_stages", "norm", "drop_path_rate")
    }


@pytest.mark.parametrize("family", FAMILIES)
def test_what_nano_has_otherwise(family):
    """A pyramid of 48 channels, anchors and photos of a fifth of the size, by iterations."""
    small, full = ours(NANO), ours(f"cascade-mask-rcnn_{family}_tiny_{RECIPE}")
    expected = {
        "model.backbone.type": "i_d_dw_conv_nano",
        "model.backbone.init": MISSING,
        "model.backbone.drop_path_rate": 0.0,
        "model.neck.in_channels": [32, 64, 128, 256],
        "model.neck.out_channels": 48,
        "model.rpn_head.in_channels": 48,
        "model.rpn_head.feat_channels": 48,
        "model.rpn_head.anchor_generator.scales": [4],
        "model.roi_head.mask_head.in_channels": 48,
        "model.roi_head.mask_head.conv_out_channels": 48,
        "model.train_cfg.rpn_proposal.nms_pre": 300,
        "model.train_cfg.rpn_proposal.max_per_img": 100,
        "model.test_cfg.rpn.nms_pre": 300,
        "model.test_cfg.rpn.max_per_img": 100,
        "train_dataloader.batch_size": 4,
        "train_dataloader.num_workers": 2,
        "train_dataloader.sampler.type": "InfiniteSampler",
        "train_dataloader.dataset.filter_cfg.min_size": 8,
        "train_dataloader.dataset.pipeline.3.type": "RandomChoiceResize",
        "train_dataloader.dataset.pipeline.3.scales": [
            *([128, 256], [144, 256], [160, 256], [176, 256])
        ],
        "train_dataloader.dataset.pipeline.3.keep_ratio": True,
        "train_dataloader.dataset.pipeline.3.transforms": MISSING,
        "tta_pipeline.1.transforms": [
            [
                {"type": "Resize", "scale": scale, "keep_ratio": True}
                for scale in ([256, 160], [205, 128], [307, 192])
            ],
            *full["tta_pipeline"][1]["transforms"][1:3],
            [dict(type="PackDetInputs", meta_keys=PACKED)],
        ],
        "optim_wrapper.type": "OptimWrapper",
        "optim_wrapper.optimizer.lr": 2e-3,
        "param_scheduler.0.start_factor": 0.01,
        "param_scheduler.0.end": 32,
        "param_scheduler.1.type": "CosineAnnealingLR",
        "param_scheduler.1.by_epoch": False,
        "param_scheduler.1.begin": 32,
        "param_scheduler.1.end": 640,
        "param_scheduler.1.eta_min_ratio": 0.01,
        "param_scheduler.1.milestones": MISSING,
        "param_scheduler.1.gamma": MISSING,
        "train_cfg.type": "IterBasedTrainLoop",
        "train_cfg.max_iters": 640,
        "train_cfg.val_interval": 640,
        "train_cfg.max_epochs": MISSING,
        "default_hooks.logger.interval": 20,
        "default_hooks.logger.log_metric_by_epoch": False,
        "default_hooks.checkpoint.interval": 160,
        "default_hooks.checkpoint.by_epoch": False,
        "log_processor.by_epoch": False,
    }
    for kind in ("bbox", "mask"):
        expected[f"model.roi_head.{kind}_roi_extractor.out_channels"] = 48
        expected[f"model.roi_head.{kind}_roi_extractor.finest_scale"] = 28
    for stage in range(3):
        head = f"model.roi_head.bbox_head.{stage}"
        expected |= {
            f"{head}.num_shared_convs": 2,
            f"{head}.in_channels": 48,
            f"{head}.conv_out_channels": 48,
            f"{head}.fc_out_channels": 128,
        }
    for split in ("val", "test"):
        expected[f"{split}_dataloader.num_workers"] = 2
        expected[f"{split}_dataloader.dataset.pipeline.1.scale"] = [256, 160]
    assert differences(small, full, *LEFT_OUT[1:]) == expected


@pytest.mark.parametrize("name", THEIRS)
def test_the_recipe_is_mmdetections(name):
    """But for the backbone; Cascade's and RetinaNet's have SGD there, AdamW as Swin's here."""
    mine, other = ours(f"methods/{name}"), theirs(THEIRS[name])
    sgd = name.startswith(("cascade", "retinanet"))
    assert differences(mine, other, *LEFT_OUT) == OURS | (ADAMW if sgd else BY_NAME)
    model = differences(mine["model"], other["model"], "backbone.")
    # Of a ResNet there.
    assert model == ({"neck.in_channels": [96, 192, 384, 768]} if "cascade" in name else {})
    places = (1, 2, 3) if "retinanet" in name else (0, 1, 2, 3)
    assert mine["model"]["backbone"] == dict(
        type="swin_tiny", init="ms_in1k", out_indices=places, drop_path_rate=0.2, norm="SyncBN"
    )


def test_cascades_adamw_is_that_of_swin():
    swin = flat(theirs(THEIRS["mask-rcnn_fpn_8xb2-1x_coco"]))
    for key, value in ADAMW.items():
        found = swin.get(key, MISSING)
        assert (list(found) if isinstance(found, tuple) else found) == value
