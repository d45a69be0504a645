"""Every config builds at full size, and the recipe is the paper's."""

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

CONFIGS = RECIPES / "segmentation"
RECIPE = "8xb2-160k_ade20k-512x512"
FULL_SIZE = sorted(path.stem for path in CONFIGS.glob(f"*{RECIPE}.py"))


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


@pytest.mark.parametrize("name", FULL_SIZE)
def test_recipe(name):
    cfg = load_config(CONFIGS / f"{name}.py")
    head, auxiliary = cfg.model.decode_head, cfg.model.auxiliary_head
    assert (head.type, head.channels, head.num_classes) == ("UPerHead", 512, 150)
    assert (auxiliary.type, auxiliary.channels, auxiliary.in_index) == ("FCNHead", 256, 2)
    assert (auxiliary.loss_decode.loss_weight, head.loss_decode.loss_weight) == (0.4, 1.0)
    assert head.norm_cfg.type == auxiliary.norm_cfg.type == cfg.model.backbone.norm == "SyncBN"
    assert cfg.model.backbone.drop_path_rate == 0.3
    assert cfg.model.test_cfg.mode == "whole"
    preprocessor = cfg.model.data_preprocessor
    assert preprocessor.bgr_to_rgb and preprocessor.mean == [123.675, 116.28, 103.53]
    assert preprocessor.std == [58.395, 57.12, 57.375]

    optimizer = cfg.optim_wrapper.optimizer
    assert (optimizer.type, optimizer.lr, optimizer.weight_decay) == ("AdamW", 6e-5, 0.01)
    assert tuple(optimizer.betas) == (0.9, 0.999)
    assert cfg.train_cfg.max_iters == 160000
    assert cfg.train_dataloader.batch_size * 8 == 16

    steps = {step.type: step for step in cfg.train_dataloader.dataset.pipeline}
    assert steps["RandomCrop"].crop_size == (512, 512)
    assert steps["RandomResize"].ratio_range == (0.5, 2.0)
    resize = [s for s in cfg.test_dataloader.dataset.pipeline if s.type == "Resize"]
    assert [(s.scale, s.keep_ratio) for s in resize] == [((2048, 512), True)]
    for loader in (cfg.train_dataloader, cfg.val_dataloader, cfg.test_dataloader):
        assert loader.dataset.data_root == "data/ade/ADEChallengeData2016"


def test_learning_rate_is_swins_schedule():
    cfg = load_config(CONFIGS / f"swin_tiny_upernet_{RECIPE}.py")
    optimizer = torch.optim.AdamW([nn.Parameter(torch.zeros(1))], lr=6e-5)
    schedulers = [
        PARAM_SCHEDULERS.build({**s, "optimizer": optimizer}) for s in cfg.param_scheduler
    ]
    rates = []
    for _ in range(160_000):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        for scheduler in schedulers:
            scheduler.step()
    assert rates[0] == pytest.approx(6e-5 * 1e-6)
    assert rates[750] == pytest.approx(3e-5, rel=2e-3)
    assert max(rates) == pytest.approx(6e-5, rel=1e-5) and 1495 <= rates.index(max(rates)) <= 1501
    for i in (20_000, 80_750, 150_000):
        assert rates[i] == pytest.approx(6e-5 * (160_000 - i) / 158_500, rel=1e-3)
    assert rates[-1] < 1e-9


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
