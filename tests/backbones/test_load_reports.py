"""Reports and refusals of a load, whole: which entries, how many, and what a file looks like."""

import logging
import re

import pytest
import timm
import torch
from torch import nn

import backbones
from backbones.checkpoints import (
    LoadReport,
    backbone_of,
    checkpoint_filter_fn,
    fit,
    imagenet_classes,
)
from backbones.layouts import LAYOUTS, family_of, from_ours, layout_of
from tests.support import build


def refusal(*args, **kwargs) -> list[str]:
    with pytest.raises(backbones.CheckpointError) as error:
        fit(*args, **kwargs)
    return str(error.value).splitlines()


@pytest.mark.parametrize("count", [1, 6, 7, 9])
def test_a_report_names_six_of_each_kind(count):
    names = tuple("abcdefghi"[:count])
    some = {1: "a", 6: "a, b, c, d, e, f"}.get(count, f"a, b, c, d, e, f, and {count - 6} more")
    report = LoadReport("x.pth", names, names, (), names[:1], 2, "3 of 4 classes")
    assert str(report) == (
        f"x.pth: {count} matched, {count} missing, 0 unexpected, 1 resized\n"
        f"  missing: {some}\n"
        "  resized: a\n"
        "  classifier: 3 of 4 classes\n"
        "  2 entries outside the backbone were ignored"
    )
    assert str(LoadReport("y", names, (), names, ())) == (
        f"y: {count} matched, 0 missing, {count} unexpected, 0 resized\n  unexpected: {some}"
    )


def test_a_load_is_reported_and_logged(tmp_path, caplog):
    """A segmentor's file for another window, more channels and other classes."""
    source = build("swin_nano", num_classes=4).state_dict()
    source = {f"backbone.{k}": v for k, v in source.items() if not k.startswith("norm.")}
    source |= {"backbone.norms.0.weight": torch.zeros(32), "decode_head.a": torch.zeros(1)}
    torch.save(source, tmp_path / "a.pth")
    model = build("swin_nano", window_size=5, in_chans=1)
    with caplog.at_level(logging.INFO):
        report = backbones.load_checkpoint(model, str(tmp_path / "a.pth"))
    tables = tuple(n for n in model.state_dict() if n.endswith("bias_table"))
    lacking = ("norm.weight", "norm.bias", "head.fc.weight", "head.fc.bias")
    matched = tuple(n.removeprefix("backbone.") for n in source if n.startswith("backbone."))
    left = ("norms.0.weight", "head.fc.weight", "head.fc.bias")
    assert sorted(report.matched) == sorted(n for n in matched if n not in left)
    assert report == LoadReport(
        source=str(tmp_path / "a.pth"),
        matched=report.matched,
        missing=lacking,
        unexpected=("norms.0.weight",),
        resized=("patch_embed.proj.weight", *tables),
        elsewhere=1,
        classifier="",
    )
    assert [record.getMessage() for record in caplog.records] == [str(report)]
    caplog.clear()
    with caplog.at_level(logging.INFO):
        state = checkpoint_filter_fn(source, model)
    assert tuple(state) == report.matched and state[tables[0]].shape == (81, 2)
    (record,) = caplog.records
    assert record.getMessage() == str(report).replace(str(tmp_path / "a.pth"), "pretrained weights")


def test_a_refusal_lists_what_is_wrong():
    model = build("dw_conv_nano")
    state = model.state_dict()
    block = "stages.3.blocks.0"
    state |= {f"{block}.mlp.fc1.bias": torch.zeros(3), f"{block}.more": torch.zeros(1)}
    state |= {"stages.4.blocks.0.more": torch.zeros(1), "more": torch.zeros(1)}
    del state[f"{block}.norm2.weight"], state["norm.bias"], state["head.fc.weight"]
    total = len(model.state_dict())
    nano = "dw_conv_nano (C=32, depths 1 1 2 1)"
    assert refusal(state, model, "x.pth") == [
        f"x.pth does not fit: {total - 4} of {total} entries match. "
        f"It looks like {nano}, the network like {nano}.",
        f"  shape: {block}.mlp.fc1.bias (3,) instead of (1024,)",
        f"  missing: {block}.norm2.weight",
        f"  unexpected: {block}.more, more",
    ]
    # A count of batches, a final norm, norms of outputs and a classifier are nobody's loss.
    state = model.state_dict() | {"norms.0.weight": torch.zeros(32), "head.a": torch.zeros(1)}
    gone = [n for n in state if n.endswith("num_batches_tracked") or n.startswith(("norm.", "hea"))]
    report = fit({k: v for k, v in state.items() if k not in gone}, model, "x.pth")[1]
    assert set(report.missing) == set(gone) - {"head.a"} and report.unexpected == (
        "norms.0.weight",
    )
    state["head.fc.bias"] = torch.zeros(7)
    assert fit(state, model, "x.pth")[1].missing == ("head.fc.bias",)


@pytest.mark.parametrize(
    "name, options, looks",
    [
        ("swin_small", {}, "swin_small (C=96, depths 2 2 18 2, heads 3 6 12 24)"),
        ("swin_tiny", {}, "swin_tiny (C=96, depths 2 2 6 2, heads 3 6 12 24)"),
        # Of nobody's depths it is the first size that is as wide.
        (
            "swin_tiny",
            {"depths": (1, 1, 1, 1)},
            "swin_tiny (C=96, depths 1 1 1 1, heads 3 6 12 24)",
        ),
        (
            "swin_base",
            {"depths": (2, 2, 11, 2)},
            "swin_base (C=128, depths 2 2 11 2, heads 4 8 16 32)",
        ),
        ("dw_conv_nano", {"embed_dim": 40}, "dw_conv_unknown size (C=40, depths 1 1 2 1)"),
        ("d_dw_conv_nano", {"depths": (1, 1)}, "d_dw_conv_nano (C=32, depths 1 1 0 0)"),
    ],
)
def test_what_a_file_looks_like(name, options, looks):
    options = options if isinstance(options, dict) else {"depths": options}
    with torch.device("meta"):
        state = timm.create_model(name, num_classes=0, **options).state_dict()
    other = build("i_d_dw_conv_nano")
    first = refusal(state, other, "x.pth")[0]
    assert first.endswith(
        f"It looks like {looks}, the network like i_d_dw_conv_nano (C=32, depths 1 1 2 1)."
    )
    first = refusal({"a": torch.zeros(1)}, other, "x.pth")[0]
    total = len(other.state_dict())
    assert first == (
        f"x.pth does not fit: 0 of {total} entries match. It looks like no family of this package, "
        "the network like i_d_dw_conv_nano (C=32, depths 1 1 2 1)."
    )


@pytest.mark.parametrize(
    "theirs, ours, said",
    [
        ("abcd", "abcd", ""),
        ("dcba", "abcd", "4 of 4 classes found among the file's 4 by name"),
        ("abcdxy", "abcd", "4 of 4 classes found among the file's 6 by name"),
        # Half of them is enough.
        ("xcya", "abcd", "2 of 4 classes found among the file's 4 by name, b, d not among them"),
        ("xcyz", "abcd", "left out: 1 of its 4 classes are among the file's 4"),
        ("cba", "abc", "3 of 3 classes found among the file's 3 by name"),
        ("xyc", "abc", "left out: 1 of its 3 classes are among the file's 3"),
        ("xac", "abc", "2 of 3 classes found among the file's 3 by name, b not among them"),
        (None, "abcd", ""),
        ("abcd", None, ""),
    ],
)
def test_rows_of_a_classifier_by_name(theirs, ours, said):
    given = build("dw_conv_nano", num_classes=len(theirs or ours)).state_dict()
    model = build("dw_conv_nano", seed=1, num_classes=len(ours or theirs))
    own = model.state_dict()
    before = {k: v.clone() for k, v in given.items()}
    fitting, report = fit(given, model, "x", theirs, ours)
    assert report.classifier == said
    for name in ("head.fc.weight", "head.fc.bias"):
        if said.startswith("left out"):
            assert name in report.missing
            continue
        for row, letter in enumerate(ours if said else ()):
            expected = given[name][theirs.index(letter)] if letter in theirs else own[name][row]
            assert fitting[name][row].equal(expected)
        assert said or fitting[name].equal(given[name])
    assert all(v.equal(before[k]) for k, v in given.items())


@pytest.mark.parametrize(
    "theirs, ours, line",
    [
        ("abc", "abcd", "3 class names for the 4 outputs of the file"),
        ("abce", "abcde", "5 class names for the 4 outputs of the network"),
    ],
)
def test_names_for_another_number_of_classes(theirs, ours, line):
    model = build("dw_conv_nano", num_classes=4)
    assert refusal(model.state_dict(), model, "x", theirs, ours) == [line]


def test_a_classifier_of_other_features_is_left_out():
    model = build("dw_conv_nano", num_classes=3)
    state = model.state_dict() | {"head.fc.weight": torch.zeros(3, 7)}
    report = fit(state, model, "x", "abc", "cba")[1]
    assert report.missing == ("head.fc.weight",) and report.classifier == ""


def test_rows_of_another_precision_and_names_in_a_file(tmp_path):
    state = {k: v.bfloat16() for k, v in build("dw_conv_nano", num_classes=3).state_dict().items()}
    torch.save({"model": state, "meta": {"classes": list("cab")}}, tmp_path / "a.pth")
    model = build("dw_conv_nano", seed=1, num_classes=3)
    backbones.load_checkpoint(model, tmp_path / "a.pth", classes="abc")
    assert model.head.fc.weight.equal(state["head.fc.weight"].float()[[1, 2, 0]])


def test_parts_of_options_are_missed_unless_asked_not_to(caplog):
    swin, model = build("swin_nano").state_dict(), build("swin_nano", depths=(1,), se_ratio=1 / 8)
    swin = {k: v for k, v in swin.items() if not k.startswith("head.")}
    added = [n for n in model.state_dict() if ".se." in n]
    lines = refusal(swin, model, "x")
    assert lines[1:] == [f"  missing: {', '.join(added)}"]
    _, report = fit(swin, model, "x", partial=True)
    others = ("norm.weight", "norm.bias", "head.fc.weight", "head.fc.bias")
    assert report.missing == (*added, *others)
    (record,) = caplog.records
    assert record.getMessage() == f"x lacks {', '.join(added)}: the model keeps its own"
    caplog.clear()
    fit(model.state_dict(), model, "x", partial=True)
    assert not caplog.records


def test_which_classes_a_number_stands_for():
    assert [len(imagenet_classes(n)) for n in (1000, 21841)] == [1000, 21841]
    swins = imagenet_classes(21841, "swin")
    assert len(set(swins)) == 21841 and set(swins) == set(imagenet_classes(21841))
    assert list(swins) != list(imagenet_classes(21841, "dw_conv")) == list(imagenet_classes(21841))
    assert imagenet_classes(1000, "swin") == imagenet_classes(1000)
    for count in (0, 999, 1001, 21840, 21842):
        assert imagenet_classes(count) is imagenet_classes(count, "swin") is None


# Which backbone


def test_a_backbone_is_found_by_its_prefix():
    ours, other = (build(n).state_dict() for n in ("swin_nano", "dw_conv_nano"))
    both = {f"a.{k}": v for k, v in ours.items()} | {f"b.c.{k}": v for k, v in other.items()}
    assert backbone_of(both, "b.c.").keys() == other.keys()
    assert backbone_of(both, family="swin").keys() == ours.keys()
    with pytest.raises(
        backbones.CheckpointError, match="under the prefix 'b.'; found: 'a.', 'b.c.'"
    ):
        backbone_of(both, "b.")
    with pytest.raises(backbones.CheckpointError) as error:
        backbone_of(both)
    assert str(error.value) == (
        "the checkpoint holds 2 backbones, under 'a.', 'b.c.': choose one with prefix=... of "
        "backbones.load_checkpoint, or extract it with tools/convert_checkpoint.py --from-prefix"
    )
    # One that nobody knows stands back; without a prefix is before all.
    vgg = {"z.features.0.0.weight": torch.zeros(1)}
    assert backbone_of(vgg | {f"a.{k}": v for k, v in ours.items()}).keys() == ours.keys()
    assert backbone_of(ours | {f"a.{k}": v for k, v in ours.items()}).keys() >= ours.keys()
    assert backbone_of({"a": vgg["z.features.0.0.weight"]}).keys() == {"a"}
    # A name that only ends like an anchor is none.
    assert backbone_of({"a.xpatch_embed.proj.weight": torch.zeros(1)}).keys() == {
        "a.xpatch_embed.proj.weight"
    }


def test_two_backbones_in_a_module_are_refused(tmp_path):
    torch.save(build("dw_conv_nano").state_dict(), tmp_path / "a.pth")
    pair = nn.Sequential(build("dw_conv_nano"), build("dw_conv_nano"))
    message = "Sequential holds 2 backbones of this package, not one"
    with pytest.raises(backbones.CheckpointError, match=f"^{message}$"):
        backbones.load_checkpoint(pair, tmp_path / "a.pth")
    other = nn.ModuleDict({"patch_embed": nn.ModuleDict({"projection": nn.Conv2d(3, 4, 4)})})
    message = "ModuleDict holds 0 backbones of this package, not one"
    with pytest.raises(backbones.CheckpointError, match=f"^{message}$"):
        backbones.load_checkpoint(other, tmp_path / "a.pth")
    with torch.device("meta"):
        empty = build("dw_conv_nano")
    message = "Pyramid is on the meta device: it holds no values"
    with pytest.raises(backbones.CheckpointError, match=f"^{message}$"):
        backbones.load_checkpoint(empty, tmp_path / "a.pth")


@pytest.mark.parametrize("name", ["swin_nano", "dw_conv_nano"])
def test_mmpretrains_norm_and_classifier_are_its_backbones(name):
    """Only beside a prefix that ends in "backbone."."""
    state = build(name).state_dict()
    inside = {
        k.replace("norm.", "norm3.", 1) if k.startswith("norm.") else k: v for k, v in state.items()
    }
    heads = {k: v for k, v in state.items() if k.startswith("head.")}
    body = {k: v for k, v in inside.items() if k not in heads}
    for before, beside in (("backbone.", ""), ("model.backbone.", "model.")):
        given = {before + k: v for k, v in body.items()}
        given |= {beside + k: v for k, v in heads.items()}
        assert backbone_of(given).keys() == state.keys()
        del given[f"{beside}head.fc.weight"]
        assert backbone_of(given).keys() == body.keys()
    given = {f"net.{k}": v for k, v in body.items()} | heads
    assert backbone_of(given).keys() == body.keys()


# Layouts from names alone


@pytest.mark.parametrize(
    "names, layout",
    [
        ("features.0.0.weight layers.0.x", "torchvision"),
        ("patch_embed.projection.weight layers.0.x", "openmmlab"),
        ("stages.0.blocks.0.x xlayers.0.x", "ours"),
        ("", "ours"),
        # A network of one stage merges nothing.
        ("layers.0.blocks.0.attn.qkv.weight", "original"),
        ("layers.0.downsample.norm.weight layers.1.downsample.norm.weight", "original"),
        ("layers.1.downsample.norm.weight", "timm"),
    ],
)
def test_a_layout_by_its_names(names, layout):
    assert layout_of(dict.fromkeys(names.split())).name == layout


@pytest.mark.parametrize("side", [4, 12])
@pytest.mark.parametrize("layout", ["original", "torchvision", "openmmlab"])
def test_other_square_windows_have_their_index(layout, side):
    """Torchvision's own of its window, in the order of its state dict."""
    from torchvision.models.swin_transformer import ShiftedWindowAttention

    state = build("swin_nano", window_size=side).state_dict()
    written = from_ours(state, LAYOUTS[layout])
    index = ShiftedWindowAttention(32, [side, side], [0, 0], 2).relative_position_index
    found = [v for k, v in written.items() if k.endswith("relative_position_index")]
    assert len(found) == 5
    assert all(v.flatten().equal(index) and v.ndim == (1 if layout[0] == "t" else 2) for v in found)
    oblong = build("swin_nano", window_size=(7, 14)).state_dict()
    table = "stages.0.blocks.0.mixer.relative_position_bias_table"
    with pytest.raises(ValueError, match=f"^{table}: the {layout} layout needs square windows$"):
        from_ours(oblong, LAYOUTS[layout])
    assert from_ours(oblong, LAYOUTS["timm"]).keys()


@pytest.mark.parametrize(
    "name, options, what",
    [
        ("dw_conv_nano", {}, "dw_conv"),
        ("dw_conv_nano", {"num_heads": (1, 2, 4, 8)}, "dw_conv as SharedDepthwiseConv"),
        ("swin_nano", {"se_ratio": 1 / 8}, "swin with stages.0.blocks.0.se.fc1.weight"),
        (
            "swin_nano",
            {"norm_layer": "centered_batchnorm"},
            "swin with stages.0.blocks.0.norm1.center",
        ),
    ],
)
def test_what_a_layout_cannot_hold_is_named(name, options, what):
    state = build(name, **options).state_dict()
    message = f"the timm layout (timm's swin_*_patch4_window7_224) holds swin, not {what}"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        from_ours(state, LAYOUTS["timm"])
    assert from_ours(state, LAYOUTS["ours"]).keys() == state.keys()
    with pytest.raises(ValueError, match="not what this file holds$"):
        from_ours({"a": torch.zeros(1)}, LAYOUTS["timm"])
    assert family_of({"a": torch.zeros(1)}) is None and family_of(state) == name[:-5]
