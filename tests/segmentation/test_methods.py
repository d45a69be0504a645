"""Recipes that people compare with: MMSegmentation's own by number, and ten iterations of each."""

import math
import sys
from inspect import signature
from pathlib import Path

import mmseg
import pytest
import torch
from mmengine.config import Config
from mmengine.optim import build_optim_wrapper
from mmengine.registry import init_default_scope
from mmseg.datasets import CityscapesDataset
from mmseg.registry import MODELS
from PIL import Image

from dense.openmmlab.backbone import fit_channels
from dense.recipes import RECIPES
from dense.segmentation.config import check, load_config, set_data_root
from tests.support import MISSING, assert_channels_said, differences, flat, losses, recipes

METHODS = RECIPES / "segmentation/methods"
THEIRS = Path(mmseg.__file__).parent / ".mim/configs"
UPERNET = "upernet_4xb2-80k_cityscapes-512x1024"
FPN = "fpn_8xb4-80k_ade20k-512x512"
MASK2FORMER = "mask2former_8xb2-160k_ade20k-512x512"


def ours(name):
    return load_config(METHODS / f"{name}.py")


def theirs(name):
    return Config.fromfile(THEIRS / f"{name}.py")


def test_there_are_no_others():
    assert {path.stem for path in METHODS.glob("*.py")} == {UPERNET, FPN, MASK2FORMER}


def test_cityscapes_folders_pass_the_check(tmp_path):
    for part, ending in (("leftImg8bit", "_leftImg8bit"), ("gtFine", "_gtFine_labelTrainIds")):
        for split, number in (("train", 1), ("train", 2), ("val", 3)):
            folder = tmp_path / part / split / "aachen"
            folder.mkdir(parents=True, exist_ok=True)
            image = Image.new("L", (8, 8), number)
            image.save(folder / f"aachen_{number}{ending}.png")
    cfg = ours(UPERNET)
    set_data_root(cfg, str(tmp_path))
    check(cfg, training=True)
    check(cfg, training=False)


# What every recipe has otherwise than MMSegmentation's: resuming, early stops, logs.
OURS = {
    "runner_type": "DenseRunner",
    "train_cfg.type": "ResumableIterTrainLoop",
    "train_dataloader.sampler.type": "ResumableSampler",
    "train_dataloader.sampler.infinite": True,
    # Shuffling is our sampler's default.
    "train_dataloader.sampler.shuffle": MISSING,
    "optim_wrapper.constructor": "DenseOptimWrapperConstructor",
    "custom_hooks.0.type": "SeedEveryIteration",
    "custom_hooks.1.type": "StopOnNonFiniteLoss",
    "vis_backends.1.type": "TensorboardVisBackend",
    "visualizer.vis_backends.1.type": "TensorboardVisBackend",
}
# And those that are of our own parts, which keep the best checkpoint too.
PARTS = OURS | {
    "default_hooks.checkpoint.max_keep_ckpts": 3,
    "default_hooks.checkpoint.save_best": "mIoU",
    "default_hooks.checkpoint.rule": "greater",
    "tta_pipeline.0.backend_args": MISSING,
    "visualizer.name": MISSING,
    "optim_wrapper.clip_grad": MISSING,
}
# What is tested beside it, or there twice.
LEFT_OUT = ("model.backbone.", "custom_imports.", "train_pipeline.", "test_pipeline.")
LEFT_OUT += ("data_preprocessor.",)
MODULES = ["dense.segmentation", "dense.segmentation.dataset", "dense.openmmlab.hooks"]
MODULES += ["dense.openmmlab.resuming", "dense.openmmlab.runner"]
SWIN = dict(type="swin_tiny", init="ms_in1k", out_indices=(0, 1, 2, 3), norm="SyncBN")


def others(mine, other, *left_out):
    return differences(mine.to_dict(), other.to_dict(), *LEFT_OUT, *left_out)


def augmented(*sizes):
    """A photo of each size and its mirror image."""
    flips = [dict(type="RandomFlip", prob=p, direction="horizontal") for p in (0.0, 1.0)]
    return [
        [dict(type="Resize", scale=list(size), keep_ratio=True) for size in sizes],
        flips,
        [dict(type="LoadAnnotations")],
        [dict(type="PackSegInputs")],
    ]


def test_upernet_on_cityscapes():
    """The data and the length are those of UPerNet's config, the rates Swin's."""
    mine = ours(UPERNET)
    endings = signature(CityscapesDataset).parameters
    expected = PARTS | {
        "model.decode_head.in_channels": [96, 192, 384, 768],
        "model.auxiliary_head.in_channels": 384,
        "model.pretrained": MISSING,
        "tta_pipeline.1.transforms": augmented(
            *((1024, 512), (1536, 768), (2048, 1024), (2560, 1280), (3072, 1536), (3584, 1792))
        ),
        "train_dataloader.num_workers": 4,
        "optim_wrapper.optimizer.type": "AdamW",
        "optim_wrapper.optimizer.lr": 6e-5,
        "optim_wrapper.optimizer.betas": [0.9, 0.999],
        "optim_wrapper.optimizer.weight_decay": 0.01,
        "optim_wrapper.optimizer.momentum": MISSING,
    }
    for split in ("train", "val", "test"):
        # The endings are MMSegmentation's defaults, which checks before it do not see.
        for key in ("img_suffix", "seg_map_suffix"):
            expected[f"{split}_dataloader.dataset.{key}"] = endings[key].default
    other = theirs("upernet/upernet_r50_4xb2-80k_cityscapes-512x1024")
    assert others(mine, other, "param_scheduler.") == expected
    assert mine.param_scheduler == [
        dict(type="LinearLR", start_factor=1e-6, by_epoch=False, begin=0, end=1500),
        dict(type="PolyLR", eta_min=0.0, power=1.0, by_epoch=False, begin=1500, end=80_000),
    ]
    assert mine.model.backbone == dict(SWIN, drop_path_rate=0.3, frozen_stages=-1)
    assert mine.custom_imports.imports == MODULES


def test_semantic_fpn():
    mine, other = ours(FPN), theirs("twins/twins_pcpvt-s_fpn_fpnhead_8xb4-80k_ade20k-512x512")
    expected = PARTS | {
        "model.neck.in_channels": [96, 192, 384, 768],
        "model.pretrained": None,
        "tta_pipeline.1.transforms": augmented(
            *((1024, 256), (1536, 384), (2048, 512), (2560, 640), (3072, 768), (3584, 896))
        ),
        "optim_wrapper.optimizer.betas": [0.9, 0.999],
    }
    # ADE20KDataset's own.
    for split, step in (("train", 1), ("val", 2), ("test", 2)):
        expected[f"{split}_dataloader.dataset.pipeline.{step}.reduce_zero_label"] = MISSING
    assert others(mine, other) == expected
    assert mine.model.backbone == dict(SWIN, drop_path_rate=other.model.backbone.drop_path_rate)
    assert mine.custom_imports.imports == MODULES


def test_mask2former():
    mine = ours(MASK2FORMER)
    other = theirs("mask2former/mask2former_swin-t_8xb2-160k_ade20k-512x512")
    keys = "optim_wrapper.paramwise_cfg.custom_keys"
    # Norms and bias tables, by name there, by type here.
    expected = OURS | dict.fromkeys(
        (
            f"{keys}.{name}"
            for name in flat(other.optim_wrapper.paramwise_cfg.custom_keys.to_dict())
            if name.startswith(("backbone.", "absolute", "relative")) and name != "backbone.lr_mult"
        ),
        MISSING,
    )
    assert others(mine, other) == expected
    assert mine.model.backbone == dict(SWIN, drop_path_rate=other.model.backbone.drop_path_rate)
    assert mine.custom_imports == dict(imports=[*MODULES, "mmdet.models"])


def test_mask2formers_rates():
    """A tenth in the backbone; no decay on norms, bias tables and embeddings, as in theirs."""
    cfg = ours(MASK2FORMER)
    init_default_scope("mmseg")
    import mmdet.models  # noqa: F401

    with torch.device("meta"):
        model = MODELS.build(cfg.model)
    groups = build_optim_wrapper(model, cfg.optim_wrapper).optimizer.param_groups
    found = {id(p): (g["lr"], g["weight_decay"]) for g in groups for p in g["params"]}
    norms = (torch.nn.LayerNorm, torch.nn.GroupNorm, torch.nn.SyncBatchNorm)
    exempt = {p for m in model.modules() if isinstance(m, norms) for p in m.parameters()}
    for name, parameter in model.named_parameters():
        embedded = ("query_embed", "query_feat", "level_embed", "relative_position_bias_table")
        plain = parameter not in exempt and not any(word in name for word in embedded)
        rate = 1e-5 if name.startswith("backbone.") else 1e-4
        assert found[id(parameter)] == pytest.approx((rate, 0.05 if plain else 0.0)), name


@pytest.mark.parametrize("path", recipes(METHODS.parent), ids=lambda path: path.stem)
def test_a_recipe_says_the_channels_that_its_backbone_has(path):
    assert_channels_said(path)


def test_the_environment_is_mmsegmentations():
    mine = Config.fromfile(METHODS.parent / "_base_/default_runtime.py")
    assert mine.env_cfg == theirs("_base_/default_runtime").env_cfg


@pytest.mark.parametrize("name", [UPERNET, FPN, MASK2FORMER])
def test_a_key_names_the_backbone(name):
    cfg = ours(name)
    cfg.model.backbone.type = "dw_conv_base"
    fit_channels(cfg.model)
    part = cfg.model.get("neck") or cfg.model.decode_head
    assert part.in_channels == [128, 256, 512, 1024]
    if name == UPERNET:
        assert cfg.model.auxiliary_head.in_channels == 512
    if name == FPN:
        assert cfg.model.decode_head.in_channels == [256] * 4
    # Another's backbone is not looked at.
    cfg.model.backbone.type = "ResNet"
    fit_channels(cfg.model)
    assert part.in_channels == [128, 256, 512, 1024]


@pytest.mark.e2e
@pytest.mark.parametrize("name", [UPERNET, FPN, MASK2FORMER])
def test_ten_iterations_on_photos(name, tools, ade_slice, tmp_path, monkeypatch):
    data = {
        f"--{split}-{kind}": str(ade_slice / folder / place)
        for split, place in (("train", "training"), ("val", "validation"))
        for kind, folder in (("images", "images"), ("masks", "annotations"))
    }
    loaders = ("train_dataloader", "val_dataloader", "test_dataloader")
    words = [
        *(str(METHODS / f"{name}.py"), "--work-dir", str(tmp_path), "--iters", "10"),
        *(word for pair in data.items() for word in pair),
        *("--classes", ",".join(f"c{i}" for i in range(1, 151)), "--reduce-zero-label"),
        *("--short-side", "64", "--cfg-options", "model.backbone.type=dw_conv_nano"),
        *("model.backbone.init=None", "train_dataloader.batch_size=2"),
        "default_hooks.logger.interval=1",
        *(f"{loader}.num_workers=0" for loader in loaders),
        *(f"{loader}.persistent_workers=False" for loader in loaders),
    ]
    monkeypatch.setattr(sys, "argv", ["tool", *words])
    monkeypatch.setattr("mmengine.runner.ValLoop.run", lambda self: {"mIoU": 0.0})
    tools.train.main()
    found = losses(tmp_path)
    assert sorted(found) == list(range(1, 11))
    assert all(math.isfinite(line["loss"]) for line in found.values())
    assert (tmp_path / "iter_10.pth").is_file()
    saved = load_config(tmp_path / f"{name}.py")
    part = saved.model.get("neck") or saved.model.decode_head
    assert part.in_channels == [32, 64, 128, 256]
