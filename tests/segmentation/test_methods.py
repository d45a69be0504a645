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
from tests.support import assert_channels_said, flat, losses, recipes

METHODS = RECIPES / "segmentation/methods"
THEIRS = Path(mmseg.__file__).parent / ".mim/configs"
UPERNET = "upernet_4xb2-80k_cityscapes-512x1024"
FPN = "fpn_8xb4-80k_ade20k-512x512"
MASK2FORMER = "mask2former_8xb2-160k_ade20k-512x512"


def ours(name):
    return load_config(METHODS / f"{name}.py")


def theirs(name):
    return Config.fromfile(THEIRS / f"{name}.py")


def fields(node, *left_out):
    plain = node.to_dict() if hasattr(node, "to_dict") else {"": node}
    # Where a config is a base of another package's, MMEngine notes it.
    left_out += ("_scope_",)
    return {key: value for key, value in flat(plain).items() if not key.startswith(left_out)}


def pipeline(cfg):
    return [fields(step) for step in cfg.train_dataloader.dataset.pipeline]


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


def test_upernet_on_cityscapes():
    """The data and the length are those of UPerNet's config, the rates Swin's."""
    mine, other = ours(UPERNET), theirs("upernet/upernet_r50_4xb2-80k_cityscapes-512x1024")
    assert pipeline(mine) == pipeline(other)
    # MMSegmentation's data set has the endings as defaults, which checks before it do not see.
    own = dict(mine.test_dataloader.dataset)
    assert own.pop("img_suffix") == signature(CityscapesDataset).parameters["img_suffix"].default
    masks = signature(CityscapesDataset).parameters["seg_map_suffix"].default
    assert own.pop("seg_map_suffix") == masks
    assert own == other.test_dataloader.dataset
    assert mine.train_dataloader.batch_size == other.train_dataloader.batch_size
    for key in ("type", "data_root", "data_prefix"):
        assert mine.train_dataloader.dataset[key] == other.train_dataloader.dataset[key]
    assert mine.train_cfg.max_iters == other.train_cfg.max_iters == 80_000
    assert mine.train_cfg.val_interval == other.train_cfg.val_interval
    assert mine.default_hooks.checkpoint.interval == other.default_hooks.checkpoint.interval
    assert mine.model.data_preprocessor.size == (512, 1024)
    for head in ("decode_head", "auxiliary_head"):
        left_out = ("in_channels",)
        assert fields(mine.model[head], *left_out) == fields(other.model[head], *left_out)
    swin = theirs("swin/swin-tiny-patch4-window7-in1k-pre_upernet_8xb2-160k_ade20k-512x512")
    assert mine.model.backbone.drop_path_rate == swin.model.backbone.drop_path_rate
    assert mine.optim_wrapper.optimizer == swin.optim_wrapper.optimizer
    assert [dict(s, end=0, begin=0) for s in mine.param_scheduler] == [
        dict(s, end=0, begin=0) for s in swin.param_scheduler
    ]
    assert [s.end for s in mine.param_scheduler] == [1500, 80_000]


def test_semantic_fpn():
    mine, other = ours(FPN), theirs("twins/twins_pcpvt-s_fpn_fpnhead_8xb4-80k_ade20k-512x512")
    left_out = ("backbone", "neck.in_channels", "pretrained", "data_preprocessor.size")
    left_out += ("data_preprocessor.test_cfg",)
    assert fields(mine.model, *left_out) == fields(other.model, *left_out)
    assert mine.model.backbone.drop_path_rate == other.model.backbone.drop_path_rate
    optimizer = mine.optim_wrapper.optimizer
    assert (optimizer.type, optimizer.lr, optimizer.weight_decay) == (
        *(other.optim_wrapper.optimizer[key] for key in ("type", "lr", "weight_decay")),
    )
    assert mine.param_scheduler == other.param_scheduler
    assert mine.train_cfg.max_iters == other.train_cfg.max_iters
    assert mine.train_cfg.val_interval == other.train_cfg.val_interval
    assert mine.train_dataloader.batch_size == other.train_dataloader.batch_size == 4


def test_mask2former():
    mine = ours(MASK2FORMER)
    other = theirs("mask2former/mask2former_swin-t_8xb2-160k_ade20k-512x512")
    assert fields(mine.model, "backbone") == fields(other.model, "backbone")
    assert mine.model.backbone.drop_path_rate == other.model.backbone.drop_path_rate
    assert mine.optim_wrapper.optimizer == other.optim_wrapper.optimizer
    assert mine.optim_wrapper.clip_grad == other.optim_wrapper.clip_grad
    [mine_rates], [other_rates] = mine.param_scheduler, other.param_scheduler
    assert fields(mine_rates) == fields(other_rates)
    assert fields(mine.train_cfg, "type") == fields(other.train_cfg, "type")
    assert pipeline(mine) == pipeline(other)
    assert mine.train_dataloader.batch_size == other.train_dataloader.batch_size


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
    expected = fields(theirs("_base_/default_runtime").env_cfg)
    assert fields(Config.fromfile(METHODS.parent / "_base_/default_runtime.py").env_cfg) == expected


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
