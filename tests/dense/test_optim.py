"""Weight decay and layer-wise learning rates: one rule in timm, MMEngine and Detectron2."""

import re

import pytest
import timm
import torch
from timm.optim import create_optimizer_v2
from torch import nn

from dense.backbone import DenseBackbone
from dense.optim import _grouped, lr_scales, merged, no_weight_decay, param_groups
from tests.support import NANO


class Segmentor(nn.Module):
    """A backbone under its usual name, and a head."""

    def __init__(self, name: str, **kwargs):
        super().__init__()
        self.backbone = DenseBackbone(name, norm="BN", **kwargs)
        self.decode_head = nn.Sequential(nn.Conv2d(256, 8, 1), nn.BatchNorm2d(8))


def settings(model: nn.Module, groups: list[dict], key: str) -> dict[str, float]:
    of = {id(p): group.get(key) for group in groups for p in group["params"]}
    return {name: of[id(p)] for name, p in model.named_parameters() if id(p) in of}


def depth(name: str) -> int:
    """Layers from the heads down in nano (blocks 1 1 2 1), counted by hand."""
    if name.startswith("backbone.patch_embed"):
        return 6
    if at := re.match(r"backbone\.stages\.(\d)\.(?:blocks\.(\d)|downsample)", name):
        return {(0, 0): 5, (1, 0): 4, (2, 0): 3, (2, 1): 2, (3, 0): 1}[int(at[1]), int(at[2] or 0)]
    return 0


@pytest.mark.parametrize("name", NANO)
def test_the_two_rules(name):
    model = Segmentor(name)
    names = {n for n, _ in model.named_parameters()}
    # By name, where the code goes by class: in the blocks every norm has "norm" in its name.
    norms = {n for n in names if re.search(r"norm\w*\.(weight|bias)$|\.norms\.|head\.1\.", n)}
    tables = {n for n in names if n.endswith("relative_position_bias_table")}
    assert len(norms) > 20 and bool(tables) == name.startswith("swin")
    assert no_weight_decay(model) == norms | tables
    biases = {n for n in names if n.endswith("bias")}
    assert no_weight_decay(model, no_decay_bias=True) == norms | tables | biases
    assert biases - norms


@pytest.mark.parametrize("name", NANO)
def test_pretraining_decays_what_timm_does(name):
    """timm's own factory: Swin's rule, from ``no_weight_decay`` and the number of dimensions."""
    model = timm.create_model(name, num_classes=5)
    optimizer = create_optimizer_v2(model, opt="adamw", lr=1e-3, weight_decay=0.05)
    theirs = settings(model, optimizer.param_groups, "weight_decay")
    ours = torch.optim.AdamW(param_groups(model, no_decay_bias=True), lr=1e-3, weight_decay=0.05)
    assert settings(model, ours.param_groups, "weight_decay") == theirs
    assert len(theirs) == len(list(model.parameters()))
    assert len(ours.param_groups) == 2


@pytest.mark.parametrize("name", NANO)
def test_layers_are_timms(name):
    model = timm.create_model(name, num_classes=5)
    optimizer = create_optimizer_v2(model, opt="adamw", lr=1e-3, weight_decay=0.05, layer_decay=0.7)
    theirs = settings(model, optimizer.param_groups, "lr_scale")
    assert lr_scales(model, 0.7) == pytest.approx(theirs)
    assert theirs["head.fc.weight"] == 1 and theirs["norm.weight"] == 0.7
    # Without a classifier nothing moves up.
    without = lr_scales(timm.create_model(name, num_classes=0), 0.7)
    assert without == {n: theirs[n] for n in without}


@pytest.mark.parametrize("name", NANO)
def test_layers_in_a_whole_model(name):
    model = Segmentor(name)
    groups = param_groups(model, 1e-3, layer_decay=0.5)
    rates = settings(model, groups, "lr")
    assert rates == {n: 1e-3 * 0.5 ** depth(n) for n in rates}
    assert len(rates) == len(list(model.parameters())) and len(groups) == 2 * 7
    # A backbone without its last stage: its last block is the heads' neighbour.
    short = lr_scales(Segmentor(name, out_indices=(0, 1)), 0.5)
    assert short["backbone.stages.1.blocks.0.mlp.fc1.weight"] == 0.5
    # timm's wrappers, however deep.
    wrapped = lr_scales(timm.create_model(name, features_only=True), 0.5)
    assert wrapped["model.patch_embed.proj.weight"] == 0.5**6


def test_backbones_beside_and_within_each_other():
    class Grouped(nn.Linear):
        def group_matcher(self):
            return {}

    def names(*parts, **more):
        model = nn.ModuleDict({**dict(parts), **more})
        return [name for name, _ in _grouped(model)]

    inner = nn.Sequential(nn.Linear(1, 1), Grouped(1, 1))
    outer = Grouped(1, 1)
    outer.deep = nn.Sequential(Grouped(1, 1))
    assert names(a=outer, ab=inner, b=Grouped(1, 1)) == ["a", "ab.1", "b"]
    assert [name for name, _ in _grouped(outer)] == [""]
    assert list(_grouped(nn.Linear(1, 1))) == []


def test_a_parameter_of_two_names_has_both():
    model = nn.ModuleDict({"a": nn.Sequential(nn.LayerNorm(2)), "b": nn.Linear(2, 2)})
    model["c"], model["d"] = model["a"][0], nn.Linear(2, 2)
    model["d"].bias = model["b"].bias
    norms = {f"{name}.{kind}" for name in ("a.0", "c") for kind in ("weight", "bias")}
    assert no_weight_decay(model) == norms
    assert no_weight_decay(model, no_decay_bias=True) == norms | {"b.bias", "d.bias"}
    linear = {f"{name}.{kind}" for name in "bd" for kind in ("weight", "bias")}
    assert lr_scales(model, 1).keys() == norms | linear
    assert sum(len(group["params"]) for group in param_groups(model)) == 5


def test_groups_of_equal_settings_are_one():
    groups = [
        {"params": [1], "lr": 0.1},
        {"params": [2], "lr": 0.2, "weight_decay": 0.0},
        {"params": [3, 4], "lr": 0.1},
        {"params": [5], "weight_decay": 0.0, "lr": 0.2},
        {"params": [6]},
    ]
    assert merged(groups) == [
        {"params": [1, 3, 4], "lr": 0.1},
        {"params": [2, 5], "lr": 0.2, "weight_decay": 0.0},
        {"params": [6]},
    ]
    assert groups[0]["params"] == [1]


def test_without_a_rate_groups_have_none():
    model = Segmentor("swin_nano")
    groups = param_groups(model)
    assert [set(group) for group in groups] == [{"params"}, {"params", "weight_decay"}]
    assert groups[1]["weight_decay"] == 0 and lr_scales(model, 1) == lr_scales(model, 1.0)
    assert set(lr_scales(model, 1).values()) == {1.0}
    assert {group["lr"] for group in param_groups(model, 0.5)} == {0.5}


def test_frozen_parameters_are_in_no_group():
    model = Segmentor("d_dw_conv_nano", frozen_stages=2)
    rates = settings(model, param_groups(model, 1e-3, layer_decay=0.5), "lr")
    assert set(rates) == {n for n, p in model.named_parameters() if p.requires_grad}
    assert not any(n.startswith(("backbone.patch_embed", "backbone.stages.1.")) for n in rates)


@pytest.mark.parametrize("name", ["swin_nano", "d_dw_conv_nano"])
@pytest.mark.parametrize("no_decay_bias", [False, True])
def test_mmengine_has_the_same_groups(name, no_decay_bias):
    engine = pytest.importorskip("mmengine.optim")
    import dense.segmentation  # noqa: F401

    model = Segmentor(name)
    wrapper = engine.build_optim_wrapper(
        model,
        dict(
            type="OptimWrapper",
            constructor="DenseOptimWrapperConstructor",
            optimizer=dict(type="AdamW", lr=1e-3, weight_decay=0.05),
            paramwise_cfg=dict(
                layer_decay=0.5,
                no_decay_bias=no_decay_bias,
                custom_keys=dict(decode_head=dict(lr_mult=10.0)),
            ),
        ),
    )
    groups = wrapper.optimizer.param_groups
    decayed = settings(model, groups, "weight_decay")
    expected = no_weight_decay(model, no_decay_bias=no_decay_bias)
    assert {n for n, value in decayed.items() if value == 0} == expected
    assert {value for n, value in decayed.items() if n not in expected} == {0.05}
    rates = settings(model, groups, "lr")
    assert len(rates) == len(list(model.parameters())) and len(groups) <= 2 * 8
    for n, rate in rates.items():
        mult = 10 if n.startswith("decode_head") else 1
        assert rate == pytest.approx(1e-3 * 0.5 ** depth(n) * mult), n


def test_mmengine_keeps_its_options_and_names_unknown_ones():
    engine = pytest.importorskip("mmengine.optim")
    import dense.segmentation  # noqa: F401

    model = Segmentor("swin_nano")
    cfg = dict(
        constructor="DenseOptimWrapperConstructor",
        optimizer=dict(type="AdamW", lr=1e-3, weight_decay=0.05),
    )
    plain = engine.build_optim_wrapper(model, cfg)
    decayed = settings(model, plain.optimizer.param_groups, "weight_decay")
    assert {n for n, value in decayed.items() if value == 0} == no_weight_decay(model)

    keys = {"bias_table": dict(decay_mult=0.5)}
    chosen = engine.build_optim_wrapper(model, cfg | dict(paramwise_cfg=dict(custom_keys=keys)))
    decayed = settings(model, chosen.optimizer.param_groups, "weight_decay")
    assert {v for n, v in decayed.items() if n.endswith("bias_table")} == {0.025}

    with pytest.raises(ValueError, match="paramwise_cfg has decay_rate: no_decay_bias, layer_dec"):
        engine.build_optim_wrapper(model, cfg | dict(paramwise_cfg=dict(decay_rate=0.9)))


def test_mmengines_constructor_says_what_is_wrong():
    pytest.importorskip("mmengine.optim")
    from dense.openmmlab.optim import DenseOptimWrapperConstructor as Constructor

    cfg = dict(optimizer=dict(type="AdamW"))
    with pytest.raises(ValueError) as error:
        Constructor(cfg, dict(lr_rate=1, decay_rate=2, layer_decay=0.5, norm_decay_mult=0.0))
    assert str(error.value) == (
        "paramwise_cfg has decay_rate, lr_rate: no_decay_bias, layer_decay, custom_keys, "
        "bias_lr_mult, bias_decay_mult, norm_decay_mult, flat_decay_mult, dwconv_decay_mult, "
        "dcn_offset_lr_mult, bypass_duplicate are valid"
    )
    with pytest.raises(ValueError, match="^layer_decay=0.5 needs optimizer.lr$"):
        Constructor(cfg, dict(layer_decay=0.5))
    given = dict(layer_decay=1.0, bypass_duplicate=True)
    made = Constructor(cfg, given)
    assert given == dict(layer_decay=1.0, bypass_duplicate=True)
    assert made.paramwise_cfg == dict(bypass_duplicate=True)
    assert (made.layer_decay, made.no_decay_bias) == (1.0, False)
    made = Constructor(cfg)
    assert (made.layer_decay, made.no_decay_bias) == (1.0, False)
    assert made.paramwise_cfg == dict(bypass_duplicate=False)


@pytest.mark.parametrize(
    "kwargs, message",
    [
        (dict(layer_decay=0.0), "layer_decay=0.0: above 0 and at most 1"),
        (dict(layer_decay=1.5), "layer_decay=1.5: above 0 and at most 1"),
        (dict(layer_decay=0.9, base_lr=None), "layer_decay=0.9 needs base_lr"),
    ],
)
def test_bad_input_is_named(kwargs, message):
    with pytest.raises(ValueError, match=message):
        param_groups(Segmentor("swin_nano"), **{"base_lr": 1e-3, **kwargs})
    with pytest.raises(ValueError, match="no part of Linear has a group_matcher"):
        param_groups(nn.Linear(2, 2), 1e-3, layer_decay=0.9)
