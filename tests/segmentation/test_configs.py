"""Every config builds at full size, and has the figures of the originals."""

from functools import cache
from typing import Any

import pytest
import torch
from mmengine.optim import build_optim_wrapper
from mmengine.registry import PARAM_SCHEDULERS, init_default_scope
from mmseg.registry import MODELS
from torch import nn

from backbones import FAMILIES
from dense.analysis.paper import TABLE_3_SEGMENTATION
from dense.recipes import RECIPES
from dense.segmentation.config import load_config
from tests.support import MISSING, differences, flat

CONFIGS = RECIPES / "segmentation"
RECIPE = "8xb2-160k_ade20k-512x512"
FULL_SIZE = sorted(path.stem for path in CONFIGS.glob(f"*{RECIPE}.py"))


def sized(tiny: Any, base: Any) -> dict[str, Any]:
    return {"tiny": tiny, "base": base}


def build(cfg, device="meta"):
    init_default_scope("mmseg")
    with torch.device(device):
        return MODELS.build(cfg.model)


def test_there_is_a_config_for_every_family_and_size():
    expected = {f"{family}_nano_upernet" for family in FAMILIES}
    for family in FAMILIES:
        for size in ("tiny", "base", "base-in22k-pre"):
            expected.add(f"{family}_{size}_upernet_{RECIPE}")
    assert {path.stem for path in CONFIGS.glob("*.py")} == expected


@pytest.mark.parametrize("name", FULL_SIZE)
def test_full_size_has_the_papers_parameters(name, expected_init):
    cfg = load_config(CONFIGS / f"{name}.py")
    model = build(cfg)
    millions = sum(p.numel() for p in model.parameters()) / 1e6
    published = TABLE_3_SEGMENTATION.get(cfg.model.backbone.type)
    assert name.startswith(cfg.model.backbone.type)
    if published:
        assert round(millions) == published.parameters
    pretraining = "in22k" if "in22k" in name else "in1k"
    assert cfg.model.backbone.init == expected_init(cfg.model.backbone.type, pretraining)
    assert list(model.backbone.channels) == list(model.decode_head.in_channels)
    assert model.auxiliary_head.in_channels == model.backbone.channels[2]


# Every field of the full-size recipes, with the figures of MMSegmentation's own Swin config, which
# are those of SwinTransformer/Swin-Transformer-Semantic-Segmentation and of the authors.
FIELDS: dict[str, Any] = {
    "train_cfg.type": "ResumableIterTrainLoop",
    "train_cfg.max_iters": 160_000,
    "train_cfg.val_interval": 16_000,
    "val_cfg.type": "ValLoop",
    "test_cfg.type": "TestLoop",
    "optim_wrapper.type": "OptimWrapper",
    "optim_wrapper.optimizer.type": "AdamW",
    "optim_wrapper.optimizer.lr": 0.00006,
    "optim_wrapper.optimizer.betas": (0.9, 0.999),
    "optim_wrapper.optimizer.weight_decay": 0.01,
    "optim_wrapper.constructor": "DenseOptimWrapperConstructor",
    "param_scheduler.0.type": "LinearLR",
    "param_scheduler.0.start_factor": 1e-6,
    "param_scheduler.0.by_epoch": False,
    "param_scheduler.0.begin": 0,
    "param_scheduler.0.end": 1500,
    "param_scheduler.1.type": "PolyLR",
    "param_scheduler.1.eta_min": 0.0,
    "param_scheduler.1.power": 1.0,
    "param_scheduler.1.by_epoch": False,
    "param_scheduler.1.begin": 1500,
    "param_scheduler.1.end": 160_000,
    "default_hooks.param_scheduler.type": "ParamSchedulerHook",
    # The papers evaluate the last checkpoint; the best one is kept beside it.
    "default_hooks.checkpoint.type": "CheckpointHook",
    "default_hooks.checkpoint.save_best": "mIoU",
    "default_hooks.checkpoint.rule": "greater",
    "default_hooks.checkpoint.by_epoch": False,
    "default_hooks.checkpoint.max_keep_ckpts": 3,
    "default_hooks.checkpoint.interval": 4000,
    "default_hooks.timer.type": "IterTimerHook",
    "default_hooks.logger.type": "LoggerHook",
    "default_hooks.logger.interval": 50,
    "default_hooks.logger.log_metric_by_epoch": False,
    "default_hooks.sampler_seed.type": "DistSamplerSeedHook",
    "default_hooks.visualization.type": "SegVisualizationHook",
    "load_from": None,
    "resume": False,
    "runner_type": "DenseRunner",
    "default_scope": "mmseg",
    "env_cfg.cudnn_benchmark": True,
    "env_cfg.mp_cfg.mp_start_method": "fork",
    "env_cfg.mp_cfg.opencv_num_threads": 0,
    "env_cfg.dist_cfg.backend": "nccl",
    "vis_backends.0.type": "LocalVisBackend",
    "vis_backends.1.type": "TensorboardVisBackend",
    "visualizer.type": "SegLocalVisualizer",
    "visualizer.vis_backends.0.type": "LocalVisBackend",
    "visualizer.vis_backends.1.type": "TensorboardVisBackend",
    "log_processor.by_epoch": False,
    "log_level": "INFO",
    "norm_cfg.type": "SyncBN",
    "norm_cfg.requires_grad": True,
    "dataset_type": "ADE20KDataset",
    "data_root": "data/ade/ADEChallengeData2016",
    "tta_model.type": "SegTTAModel",
    "tta_pipeline.0.type": "LoadImageFromFile",
    "tta_pipeline.1.type": "TestTimeAug",
    # Swin's six ratios of 2048x512, and the mirror image of each.
    "tta_pipeline.1.transforms": [
        [
            {"type": "Resize", "scale": scale, "keep_ratio": True}
            for scale in (
                *((1024, 256), (1536, 384), (2048, 512)),
                *((2560, 640), (3072, 768), (3584, 896)),
            )
        ],
        [{"type": "RandomFlip", "prob": p, "direction": "horizontal"} for p in (0.0, 1.0)],
        [{"type": "LoadAnnotations"}],
        [{"type": "PackSegInputs"}],
    ],
    "custom_hooks.0.type": "SeedEveryIteration",
    "custom_hooks.1.type": "StopOnNonFiniteLoss",
    "model.type": "EncoderDecoder",
    "model.data_preprocessor.type": "SegDataPreProcessor",
    "model.data_preprocessor.size": (512, 512),
    "model.data_preprocessor.mean": [123.675, 116.28, 103.53],
    "model.data_preprocessor.std": [58.395, 57.12, 57.375],
    "model.data_preprocessor.bgr_to_rgb": True,
    "model.data_preprocessor.pad_val": 0,
    "model.data_preprocessor.seg_pad_val": 255,
    "model.backbone.out_indices": (0, 1, 2, 3),
    "model.backbone.drop_path_rate": 0.3,
    "model.backbone.frozen_stages": -1,
    "model.backbone.norm": "SyncBN",
    "model.decode_head.type": "UPerHead",
    "model.decode_head.in_channels": sized([96, 192, 384, 768], [128, 256, 512, 1024]),
    "model.decode_head.in_index": [0, 1, 2, 3],
    "model.decode_head.pool_scales": (1, 2, 3, 6),
    "model.decode_head.channels": 512,
    "model.decode_head.dropout_ratio": 0.1,
    "model.decode_head.num_classes": 150,
    "model.decode_head.norm_cfg.type": "SyncBN",
    "model.decode_head.norm_cfg.requires_grad": True,
    "model.decode_head.align_corners": False,
    "model.decode_head.loss_decode.type": "CrossEntropyLoss",
    "model.decode_head.loss_decode.use_sigmoid": False,
    "model.decode_head.loss_decode.loss_weight": 1.0,
    "model.auxiliary_head.type": "FCNHead",
    "model.auxiliary_head.in_channels": sized(384, 512),
    "model.auxiliary_head.in_index": 2,
    "model.auxiliary_head.channels": 256,
    "model.auxiliary_head.num_convs": 1,
    "model.auxiliary_head.concat_input": False,
    "model.auxiliary_head.dropout_ratio": 0.1,
    "model.auxiliary_head.num_classes": 150,
    "model.auxiliary_head.norm_cfg.type": "SyncBN",
    "model.auxiliary_head.norm_cfg.requires_grad": True,
    "model.auxiliary_head.align_corners": False,
    "model.auxiliary_head.loss_decode.type": "CrossEntropyLoss",
    "model.auxiliary_head.loss_decode.use_sigmoid": False,
    "model.auxiliary_head.loss_decode.loss_weight": 0.4,
    "model.test_cfg.mode": "whole",
    # 8 processes.
    "train_dataloader.batch_size": 2,
    "train_dataloader.sampler.type": "ResumableSampler",
    "train_dataloader.sampler.infinite": True,
    "train_dataloader.dataset.data_prefix.img_path": "images/training",
    "train_dataloader.dataset.data_prefix.seg_map_path": "annotations/training",
    "train_dataloader.dataset.pipeline.0.type": "LoadImageFromFile",
    "train_dataloader.dataset.pipeline.1.type": "LoadAnnotations",
    "train_dataloader.dataset.pipeline.2.type": "RandomResize",
    "train_dataloader.dataset.pipeline.2.scale": (2048, 512),
    "train_dataloader.dataset.pipeline.2.ratio_range": (0.5, 2.0),
    "train_dataloader.dataset.pipeline.2.keep_ratio": True,
    "train_dataloader.dataset.pipeline.3.type": "RandomCrop",
    "train_dataloader.dataset.pipeline.3.crop_size": (512, 512),
    "train_dataloader.dataset.pipeline.3.cat_max_ratio": 0.75,
    "train_dataloader.dataset.pipeline.4.type": "RandomFlip",
    "train_dataloader.dataset.pipeline.4.prob": 0.5,
    "train_dataloader.dataset.pipeline.5.type": "PhotoMetricDistortion",
    "train_dataloader.dataset.pipeline.6.type": "PackSegInputs",
}
for evaluated in ("val", "test"):
    loader = f"{evaluated}_dataloader"
    FIELDS |= {
        f"{evaluated}_evaluator.type": "IoUMetric",
        f"{evaluated}_evaluator.iou_metrics": ["mIoU"],
        f"{loader}.batch_size": 1,
        f"{loader}.sampler.type": "DefaultSampler",
        f"{loader}.sampler.shuffle": False,
        f"{loader}.dataset.data_prefix.img_path": "images/validation",
        f"{loader}.dataset.data_prefix.seg_map_path": "annotations/validation",
        f"{loader}.dataset.pipeline.0.type": "LoadImageFromFile",
        f"{loader}.dataset.pipeline.1.type": "Resize",
        f"{loader}.dataset.pipeline.1.scale": (2048, 512),
        f"{loader}.dataset.pipeline.1.keep_ratio": True,
        f"{loader}.dataset.pipeline.2.type": "LoadAnnotations",
        f"{loader}.dataset.pipeline.3.type": "PackSegInputs",
    }
for key in ("train", "val", "test"):
    # ADE20KDataset ignores the label 0 and numbers the classes from 1.
    FIELDS[f"{key}_dataloader.dataset.type"] = "ADE20KDataset"
    FIELDS[f"{key}_dataloader.dataset.data_root"] = "data/ade/ADEChallengeData2016"
    FIELDS[f"{key}_dataloader.num_workers"] = 4
    FIELDS[f"{key}_dataloader.persistent_workers"] = True
# The backbone, tested above, modules without which nothing is built, and what is there twice.
OTHER = ("model.backbone.type", "model.backbone.init", "custom_imports.")
OTHER += ("train_pipeline.", "test_pipeline.")


@cache
def fields(name: str) -> dict[str, Any]:
    return flat(load_config(CONFIGS / f"{name}.py").to_dict())


@pytest.mark.parametrize("key", FIELDS)
def test_a_field_has_the_figure_of_the_originals(key):
    for name in FULL_SIZE:
        expected = FIELDS[key]
        if isinstance(expected, dict):
            expected = expected["tiny" if "_tiny" in name else "base"]
        assert fields(name).get(key) == expected, name


@pytest.mark.parametrize("name", FULL_SIZE)
def test_the_table_of_fields_has_them_all(name):
    assert [key for key in fields(name) if key not in FIELDS and not key.startswith(OTHER)] == []


@pytest.mark.parametrize("family", FAMILIES)
def test_what_nano_has_otherwise_than_160k_of_ade20k(family):
    """Photos at their own scale, of which most of a crop may be one class; no drop path."""
    small, full = (
        load_config(CONFIGS / f"{family}_{name}.py").to_dict()
        for name in ("nano_upernet", f"tiny_upernet_{RECIPE}")
    )
    expected = {
        "model.data_preprocessor.size": [256, 256],
        "model.backbone.type": f"{family}_nano",
        "model.backbone.init": MISSING,
        "model.backbone.drop_path_rate": 0.0,
        "model.decode_head.in_channels": [32, 64, 128, 256],
        "model.decode_head.channels": 64,
        "model.auxiliary_head.in_channels": 128,
        "model.auxiliary_head.channels": 32,
        "train_dataloader.batch_size": 6,
        "train_dataloader.num_workers": 2,
        "val_dataloader.num_workers": 2,
        "test_dataloader.num_workers": 2,
        "optim_wrapper.optimizer.lr": 3e-3,
        "param_scheduler.0.start_factor": 0.01,
        "param_scheduler.0.end": 50,
        "param_scheduler.1.begin": 50,
        "param_scheduler.1.end": 600,
        "train_cfg.max_iters": 600,
        "train_cfg.val_interval": 300,
        "default_hooks.logger.interval": 10,
        "default_hooks.checkpoint.interval": 100,
    }
    pipelines = ("train_pipeline", "test_pipeline", "tta_pipeline")
    inside = tuple(f"{split}_dataloader.dataset.pipeline" for split in ("train", "val", "test"))
    assert differences(small, full, *pipelines, *inside) == expected

    sizes = [dict(type="Resize", scale_factor=0.25 * n, keep_ratio=True) for n in range(2, 8)]
    assert small["train_pipeline"] == small["train_dataloader"]["dataset"]["pipeline"]
    assert small["train_pipeline"] == [
        dict(type="LoadImageFromFile"),
        dict(type="LoadAnnotations"),
        dict(type="RandomChoice", transforms=[[size] for size in sizes[:-1]]),
        dict(type="RandomCrop", crop_size=(256, 256), cat_max_ratio=0.95),
        dict(type="RandomFlip", prob=0.5),
        dict(type="PackSegInputs"),
    ]
    steps = [dict(type=name) for name in ("LoadImageFromFile", "LoadAnnotations", "PackSegInputs")]
    assert small["test_pipeline"] == steps
    assert [small[f"{s}_dataloader"]["dataset"]["pipeline"] for s in ("val", "test")] == [steps] * 2
    load, augment = small["tta_pipeline"]
    assert load == full["tta_pipeline"][0]
    _, *others = full["tta_pipeline"][1]["transforms"]
    assert augment == dict(type="TestTimeAug", transforms=[sizes, *others])


def test_rates_are_those_of_mmsegmentation():
    """Ten points; with mmcv 1, the authors' decay began at iteration 0: 0.9% lower throughout."""
    cfg = load_config(CONFIGS / f"swin_tiny_upernet_{RECIPE}.py")
    optimizer = torch.optim.AdamW([nn.Parameter(torch.zeros(1))], lr=cfg.optim_wrapper.optimizer.lr)
    schedulers = [
        PARAM_SCHEDULERS.build({**s, "optimizer": optimizer}) for s in cfg.param_scheduler
    ]
    rates = []
    for _ in range(cfg.train_cfg.max_iters):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        for scheduler in schedulers:
            scheduler.step()
    assert len(rates) == 160_000
    for i in (0, 10, 750, 1499):
        assert rates[i] == pytest.approx(6e-5 * (1e-6 + (1 - 1e-6) * i / 1499), rel=1e-6)
    for i in (1501, 20_000, 80_750, 120_000, 150_000, 159_000):
        assert rates[i] == pytest.approx(6e-5 * (159_999 - i) / 158_499, rel=1e-6)
        assert 0.98 < 6e-5 * (160_000 - i) / 160_000 / rates[i] < 1
    assert rates[-1] == 0


@pytest.mark.parametrize("family", FAMILIES)
def test_no_decay_on_norms_and_bias_tables(family):
    cfg = load_config(CONFIGS / f"{family}_tiny_upernet_{RECIPE}.py")
    model = build(cfg)
    wrapper = build_optim_wrapper(model, cfg.optim_wrapper)
    groups = wrapper.optimizer.param_groups
    decay = {id(p): g["weight_decay"] for g in groups for p in g["params"]}
    assert len(decay) == len(list(model.parameters()))

    normalising = nn.LayerNorm | nn.BatchNorm2d | nn.SyncBatchNorm
    found = {"norm": 0, "table": 0, "decayed": 0}
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if isinstance(module, normalising):
                kind = "norm"
            elif name == "relative_position_bias_table":
                kind = "table"
            else:
                kind = "decayed"
            found[kind] += 1
            assert decay[id(parameter)] == (0.01 if kind == "decayed" else 0.0), name
    assert found["norm"] > 60 and found["decayed"] > 60
    assert found["table"] == (12 if "swin" in family else 0)
