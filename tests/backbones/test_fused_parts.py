"""What a fused network is made of, which way its blocks go, and in what pieces."""

from collections import Counter
from importlib import import_module
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import backbones
from backbones import inference, ops
from backbones.inference import InferenceBlock, InferenceLinear, InferenceMerging, _parts, _stripes
from backbones.pyramid import Block, PatchMerging
from tests.support import build

X = torch.randn(2, 3, 40, 52, generator=torch.Generator().manual_seed(0))
# Of the mixer: what has weights, and what activations became. BatchNorm2d is what cannot go.
MIXERS = {
    "swin": {"qkv": "InferenceLinear", "proj": "InferenceLinear"},
    "swin_local_mlp": {"value": "InferenceLinear", "proj": "InferenceLinear"},
    "dw_conv": {"conv": "Conv2d"},
    "d_dw_conv": {
        "reduce": "InferenceLinear",
        "reduce_norm": "Identity",
        "expand": "InferenceLinear",
    },
    "i_d_dw_conv": {
        "reduce": "InferenceLinear",
        "reduce_norm": "Identity",
        "expand": "Linear",
        "mid_norm": "BatchNorm2d",
    },
}
AROUND = {
    "in_proj": "InferenceLinear",
    "in_norm": "Identity",
    "in_act": "Identity",
    "mid_norm": "Identity",
    "mid_act": "ReLU",
    "out_proj": "InferenceLinear",
    "out_norm": "Identity",
}


@pytest.mark.parametrize("family", backbones.FAMILIES)
def test_what_takes_the_place_of_each_part(family):
    model = build(f"{family}_nano")
    kinds = {name: type(m) for name, m in model.named_modules()}
    fused = backbones.fuse(model)
    assert {name: type(m) for name, m in model.named_modules()} == kinds
    conv = not family.startswith("swin")
    mixer = (AROUND if conv else {}) | MIXERS[family]
    for place, module in fused.named_modules():
        kind, last = type(module).__name__, place.rpartition(".")[2]
        parent = place.split(".")[-2:-1]
        if last in mixer and parent == ["mixer"]:
            assert kind == mixer[last], place
        elif ".mlp" in place:
            expected = {"mlp": "InferenceMlp"}.get(last, "InferenceLinear")
            assert kind == expected and getattr(module, "activation", "none") == (
                "gelu" if last == "fc1" else "none"
            )
        elif last in ("norm1", "norm2"):
            assert kind == ("Identity" if conv else "LayerNorm")
        elif last == "reduction":
            assert kind == "InferenceLinear"
        elif "blocks" in place.split(".")[-2:-1]:
            assert kind == "InferenceBlock"
        elif last == "downsample":
            assert kind == ("Identity" if place.startswith("stages.0") else "InferenceMerging")
        elif last != "mixer" and "drop" not in last:
            assert type(module) is kinds[place], place
        if last == "in_proj":
            assert module.activation == "relu" and "activation=relu" in repr(module)
    assert type(fused.head.fc) is nn.Linear


def test_other_classes_stay_what_they_are():
    class Other(Block):
        pass

    class Merging(PatchMerging):
        pass

    model = build("dw_conv_nano", depths=(1, 1))
    model.stages[0].blocks[0].__class__, model.stages[1].downsample.__class__ = Other, Merging
    fused = backbones.fuse(model)
    assert type(fused.stages[0].blocks[0]) is Other
    assert type(fused.stages[1].downsample) is Merging
    kinds = Counter(type(m).__name__ for m in fused.modules())
    assert kinds["InferenceBlock"] == 1 and kinds["InferenceMlp"] == 2
    # Two projections and two of an MLP in a block, and one of the merging.
    assert kinds["InferenceLinear"] == 2 * 4 + 1


def test_a_linear_says_what_it_is():
    linear = InferenceLinear(nn.Linear(3, 5))
    assert repr(linear) == "InferenceLinear(in_features=3, out_features=5, bias=True)"
    linear = InferenceLinear(nn.Linear(5, 3, bias=False))
    linear.activation = "relu"
    said = "in_features=5, out_features=3, bias=False, activation=relu"
    assert repr(linear) == f"InferenceLinear({said})" and linear.weight.shape == (3, 5)


def hooked(name):
    return lambda block: block.get_submodule(name).register_forward_hook(lambda *_: None)


def replaced(name, layer):
    return lambda block: block.set_submodule(name, layer)


CENTERED = dict(norm_layer="centered_batchnorm")
WAYS = [
    ("swin", {}, None, "_by_windows"),
    ("swin_local_mlp", {}, None, "_by_windows"),
    ("dw_conv", {}, None, "_by_rows"),
    ("dw_conv", dict(num_heads=(2,)), None, "_by_rows"),
    ("d_dw_conv", {}, None, "_by_rows"),
    ("i_d_dw_conv", {}, None, "_by_rows"),
    ("swin", dict(sliding=True), None, "mixed"),
    ("swin", dict(se_ratio=0.25), None, "mixed"),
    ("dw_conv", dict(local_kernel=3), None, "mixed"),
    ("swin", dict(norm_layer="batchnorm"), None, "mixed"),
    ("swin", CENTERED, None, "forward"),
    ("dw_conv", CENTERED, None, "forward"),
    ("dw_conv", dict(norm_layer="layernorm"), None, "mixed"),
    ("swin", {}, hooked("norm1"), "mixed"),
    ("swin", {}, hooked("mixer"), "mixed"),
    ("swin", {}, hooked("norm2"), "forward"),
    ("swin", {}, hooked("mlp"), "forward"),
    ("dw_conv", {}, hooked("mixer"), "mixed"),
    ("dw_conv", {}, hooked("mixer.mid_act"), "mixed"),
    ("dw_conv", {}, hooked("mixer.out_norm"), "mixed"),
    ("dw_conv", {}, replaced("mixer.mid_act", nn.Tanh()), "mixed"),
    ("dw_conv", {}, replaced("norm2", nn.Tanh()), "forward"),
    ("dw_conv", {}, lambda block: block.train(), "forward"),
]


@pytest.mark.parametrize("family, options, change, way", WAYS)
def test_which_way_a_block_goes(family, options, change, way, monkeypatch):
    """All give what the block gives, position by position or window by window where that can be."""
    fused = backbones.fuse(build(f"{family}_nano", depths=(1,), **options))
    block = fused.stages[0].blocks[0]
    if change:
        change(block)
    x = torch.randn(2, 9, 11, 32, generator=torch.Generator().manual_seed(0))
    calls = []
    for name in ("_by_windows", "_by_rows", "mixed"):
        real = getattr(InferenceBlock, name)
        monkeypatch.setattr(
            InferenceBlock,
            name,
            lambda *args, name=name, real=real: calls.append(name) or real(*args),
        )
    forward = Block.forward
    monkeypatch.setattr(Block, "forward", lambda *a: calls.append("forward") or forward(*a))
    with torch.no_grad():
        expected = forward(block, x)
        calls.clear()
        with ops.force("onednn"):
            given = x.clone()
            got = block(given)
    assert calls[0] == way and given.equal(x)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    # With gradients it is the block as it is.
    calls.clear()
    with ops.force("onednn"):
        block(x)
    assert calls[0] == "forward"


@pytest.mark.parametrize("hook", [None, "norm", "reduction"])
@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("size", [(7, 10), (8, 5), (1, 1)])
def test_which_way_a_merging_goes(hook, gradients, size, monkeypatch):
    merging = backbones.fuse(build("swin_nano", depths=(1, 1))).stages[1].downsample
    assert type(merging) is InferenceMerging
    if hook:
        hooked(hook)(merging)
    forward, calls = PatchMerging.forward, []
    monkeypatch.setattr(PatchMerging, "forward", lambda *a: calls.append(1) or forward(*a))
    x = torch.randn(3, *size, 32)
    with torch.set_grad_enabled(gradients), ops.force("onednn"):
        got = merging(x)
    assert len(calls) == bool(hook or gradients)
    torch.testing.assert_close(got, forward(merging, x), rtol=1e-4, atol=1e-5)
    with torch.set_grad_enabled(gradients), ops.force("onednn"), torch.autocast("cpu"):
        assert merging(x).dtype == torch.bfloat16


@pytest.mark.parametrize(
    "name, options",
    [
        ("swin_nano", dict(conv="pre")),
        ("swin_nano", dict(conv="pre_full", se_ratio=0.25)),
        ("dw_conv_nano", dict(num_heads=(1, 2), local_kernel=3)),
        ("i_d_dw_conv_nano", dict(norm_layer="centered_batchnorm")),
    ],
)
def test_all_of_it_evaluates(name, options):
    fused = backbones.fuse(build(name, depths=(1, 1), **options).train())
    assert not any(module.training for module in fused.modules())
    norms = [n for n, m in fused.named_modules() if ".pre.norm" in n and type(m) is not nn.Identity]
    assert not norms


@pytest.mark.parametrize("family", backbones.FAMILIES)
def test_mlps_that_somebody_changed_stay(family):
    """Their hooks see what they saw; another GELU is another function."""
    model = build(f"{family}_nano", depths=(1, 1)).double()
    model(X.double())
    first, second = (stage.blocks[0].mlp for stage in model.eval().stages)
    first.register_forward_pre_hook(lambda _, given: (2 * given[0],))
    first.register_forward_hook(lambda *given: given[2] + 1)
    second.act = nn.GELU("tanh")
    fused = backbones.fuse(model)
    kinds = [type(stage.blocks[0].mlp).__name__ for stage in fused.stages]
    assert kinds == ["Mlp", "Mlp"]
    with torch.no_grad():
        torch.testing.assert_close(fused(X.double()), model(X.double()), rtol=1e-9, atol=1e-9)


# Pieces


@pytest.mark.parametrize(
    "images, height, number, expected",
    [
        (3, 5, 1, ["0:3 0:5"]),
        (3, 5, 2, ["0:2 0:5", "2:4 0:5"]),
        (2, 5, 2, ["0:1 0:5", "1:2 0:5"]),
        (2, 5, 4, ["0:1 0:3", "0:1 3:5", "1:2 0:3", "1:2 3:5"]),
        (1, 7, 3, ["0:1 0:3", "0:1 3:6", "0:1 6:7"]),
        (1, 2, 9, ["0:1 0:1", "0:1 1:2"]),
    ],
)
def test_parts_of_a_batch(images, height, number, expected):
    parts = [f"{a.start}:{a.stop} {b.start}:{b.stop}" for a, b in _parts(images, height, number)]
    assert parts == expected


@pytest.mark.parametrize(
    "shifted, columns, number, expected",
    [
        (True, 2, 1, ["0:3 0:12 2,3"]),
        (True, 2, 3, ["0:1 2:6 0,3", "1:2 6:10 0,3", "2:3 0:2+10:12 2,3"]),
        (True, 1, 3, ["0:1 2:6 0,0", "1:2 6:10 0,0", "2:3 0:2+10:12 2,0"]),
        (True, 2, 2, ["0:2 2:10 0,3", "2:3 0:2+10:12 2,3"]),
        (False, 2, 2, ["0:2 0:8 0,0", "2:3 8:12 0,0"]),
        (False, 2, 1, ["0:3 0:12 0,0"]),
    ],
)
def test_stripes_of_windows(shifted, columns, number, expected):
    """Three rows of windows of 4 x 6, moved by 2 and 3: the last goes on at the map's beginning."""
    mixer = SimpleNamespace(window_size=(4, 6), shifted=shifted)
    got = [
        f"{rows.start}:{rows.stop} {'+'.join(f'{p.start}:{p.stop}' for p in places)} {down},{right}"
        for _, rows, places, (down, right) in _stripes(1, (3, columns), mixer, number)
    ]
    assert got == expected


@pytest.mark.parametrize("family", ["swin", "swin_local_mlp", "dw_conv"])
def test_pieces_fill_the_cache(family, monkeypatch):
    """Hidden maps of MLPs, and what merging copies and normalises, are of the cache's size."""
    cache = 2**16
    monkeypatch.setattr(import_module("backbones.ops.linear"), "_HIDDEN", cache)
    fused = backbones.fuse(build(f"{family}_nano", num_classes=0, depths=(1, 1), img_size=256))
    real, hidden, merged = inference.prepared, [], []

    def prepared(x, weight, *others):
        run, (rows, columns) = real(x, weight, *others), weight.shape

        def noted(x):
            if rows == 4 * columns:
                hidden.append(x.numel() // columns * rows * 4)
            if columns == 4 * 32 and rows == 2 * 32:
                merged.append(2 * x.numel() * 4)
            return run(x)

        return noted

    monkeypatch.setattr(inference, "prepared", prepared)
    with torch.no_grad(), ops.force("onednn"):
        fused.forward_features(torch.randn(1, 3, 256, 256))
    # 64 x 64 positions of 32 channels, then 32 x 32 of 64.
    assert merged[0] == cache and len(merged) == 16
    assert sum(hidden) == (64 * 64 * 128 + 32 * 32 * 256) * 4
    assert max(hidden) <= 1.3 * cache and sum(hidden) / len(hidden) > 0.6 * cache


@pytest.mark.parametrize("family", backbones.FAMILIES)
def test_what_is_kept_goes_with_a_move(family):
    """Packed weights would be of another type or place; a network that has not run has none."""
    fused = backbones.fuse(build(f"{family}_nano", depths=(1, 1)))

    def kept():
        packed = [m.packed._kept for m in fused.modules() if isinstance(m, InferenceLinear)]
        blocks = [m.kept._kept for m in fused.modules() if isinstance(m, InferenceBlock)]
        return sum(k is not None for k in packed), sum(k is not None for k in blocks)

    assert kept() == (0, 0)
    with torch.no_grad(), ops.force("onednn"):
        fused(X)
        linears = sum(isinstance(m, InferenceLinear) for m in fused.modules())
        windows = 2 if family.startswith("swin") else 0
        assert kept() == (linears, windows)
        held = [m.kept._kept for m in fused.modules() if isinstance(m, InferenceBlock)]
        fused(X)
        again = [m.kept._kept for m in fused.modules() if isinstance(m, InferenceBlock)]
        assert all(a is b for a, b in zip(held, again, strict=True))
    fused.requires_grad_(False).float()
    assert kept() == (0, 0)


@pytest.mark.parametrize("size", [(64, 64), (40, 52), (70, 130)])
def test_weights_of_windows_are_kept_as_the_kernel_reads_them(size, monkeypatch):
    """Whatever the image's size: in another order of memory each call would copy them."""
    given, mixed = [], ops.local_mlp

    def local_mlp(value, weight, *others):
        given.append(weight.is_contiguous())
        return mixed(value, weight, *others)

    monkeypatch.setattr(ops, "local_mlp", local_mlp)
    fused = backbones.fuse(build("swin_local_mlp_nano", img_size=64))
    with torch.no_grad(), ops.force("onednn"):
        fused(torch.randn(1, 3, *size))
    assert len(given) >= 4 and all(given)
