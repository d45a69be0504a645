"""The converter: bits survive the way there and back, and bad requests cost nothing."""

import json
import os
import pickle

import pytest
import timm
import torch
from safetensors import safe_open

import backbones
from backbones.conversion import convert_checkpoint, write_weights
from backbones.layouts import LAYOUTS
from backbones.reading import read_content
from tests.support import load_tool

tool = load_tool("convert_checkpoint")


@pytest.fixture
def saved(tmp_path):
    torch.manual_seed(0)
    model = timm.create_model("swin_nano", num_classes=3)
    path = tmp_path / "ours.pth"
    content = {"state_dict": model.state_dict(), "meta": {"classes": ["a", "b", "c"]}}
    torch.save(content, path)
    return path, model.state_dict()


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_there_and_back(saved, layout, suffix, tmp_path, capsys):
    path, weights = saved
    there, back = tmp_path / f"new/folder/there{suffix}", tmp_path / f"back{suffix}"
    assert tool.main([str(path), str(there), "--to", layout, "--prefix", "backbone."]) == 0
    assert tool.main([str(there), str(back), "--to", "ours"]) == 0
    said = capsys.readouterr().out
    found = backbones.read_checkpoint(back)
    for name, value in weights.items():
        if name.startswith(LAYOUTS[layout].drops):
            assert name not in found and f"left out, which {layout} has no place for" in said
        else:
            assert found[name].equal(value)
    target = timm.create_model("swin_nano", num_classes=2)
    report = backbones.load_checkpoint(target, back, classes=["c", "a"])
    if "head." not in LAYOUTS[layout].drops:
        assert target.head.fc.weight.equal(weights["head.fc.weight"][[2, 0]])
    assert not report.unexpected


def test_a_pickle_needs_trust(saved, tmp_path, capsys):
    _, weights = saved
    pickled = tmp_path / "model_final.pkl"
    arrays = {f"backbone.bottom_up.{k}": v.numpy() for k, v in weights.items()}
    pickled.write_bytes(pickle.dumps({"model": arrays, "__author__": "somebody"}))
    model = timm.create_model("swin_nano", num_classes=3)
    with pytest.raises(backbones.CheckpointError, match="every .pkl.*weights_only=False.*--trust"):
        backbones.load_checkpoint(model, pickled)
    assert tool.main([str(pickled), str(tmp_path / "safe.safetensors"), "--to", "ours"]) == 2
    assert "--trust" in capsys.readouterr().err
    target = str(tmp_path / "safe.safetensors")
    assert tool.main([str(pickled), target, "--to", "ours", "--trust"]) == 0
    backbones.load_checkpoint(model, target)
    assert model.head.fc.weight.equal(weights["head.fc.weight"])
    backbones.load_checkpoint(model, pickled, weights_only=False)


def test_what_cannot_be_done_is_one_line_and_writes_nothing(saved, tmp_path, capsys):
    path, _ = saved
    dw = tmp_path / "dw.pth"
    torch.save(timm.create_model("dw_conv_nano", num_classes=0).state_dict(), dw)
    other = tmp_path / "other.pth"
    torch.save(timm.create_model("resnet10t", num_classes=0).state_dict(), other)
    target = tmp_path / "out.pth"
    for args, reason in (
        ([dw, target, "--to", "torchvision"], "holds swin, not dw_conv"),
        ([other, target, "--to", "ours"], "no backbone of a family"),
        ([tmp_path / "absent.pth", target, "--to", "ours"], "no checkpoint at"),
        ([path, tmp_path / "out.onnx", "--to", "ours"], ".safetensors is needed"),
        ([path, path, "--to", "ours"], "--overwrite replaces it"),
    ):
        assert tool.main([str(arg) for arg in args]) == 2
        error = capsys.readouterr().err
        assert reason in error and error.count("\n") == 1
        assert not target.exists()


# By the function, whole


DROPS = {
    "ours": (),
    "original": (),
    "timm": ("norms.",),
    "torchvision": ("norms.",),
    "openmmlab": ("norm.", "head."),
    "detectron2": ("norm.", "head."),
}
WRAPPERS = {"original": "model", "openmmlab": "state_dict", "detectron2": "model"}


@pytest.mark.parametrize("classes", [None, ("a", "b", "c")])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_is_written_and_what_is_left_out(layout, classes, tmp_path):
    """Of a segmentor's backbone, with norms of its outputs and something that nobody knows."""
    torch.manual_seed(0)
    model = timm.create_model("swin_nano", num_classes=3)
    ours = model.state_dict() | {"norms.0.weight": torch.zeros(32), "neck.weight": torch.zeros(1)}
    content = {f"backbone.{name}": value for name, value in ours.items()}
    content["decode_head.weight"] = torch.zeros(2)
    torch.save({"state_dict": content, "meta": {"classes": classes}}, tmp_path / "from.pth")
    done = convert_checkpoint(tmp_path / "from.pth", tmp_path / "to.pth", layout, prefix="net.")
    assert (done.family, done.source) == ("swin", LAYOUTS["ours"])
    dropped = tuple(n for n in ours if n == "neck.weight" or n.startswith(DROPS[layout]))
    assert done.left_out == dropped
    written = torch.load(tmp_path / "to.pth", weights_only=True)
    kept = classes if "head." not in DROPS[layout] else None
    wrapper = WRAPPERS.get(layout, "state_dict" if kept else None)
    if wrapper:
        assert written.keys() == ({wrapper, "meta"} if kept else {wrapper})
        assert not kept or written["meta"] == {"classes": list(classes)}
        written = written[wrapper]
    assert tuple(written) == done.written and all(n.startswith("net.") for n in written)
    blocks = 5 if layout in ("original", "torchvision", "openmmlab", "detectron2") else 0
    shape = (49 * 49,) if layout == "torchvision" else (49, 49)
    indices = [v for n, v in written.items() if n.endswith("relative_position_index")]
    assert [tuple(value.shape) for value in indices] == [shape] * blocks
    assert len(written) == len(ours) - len(dropped) + blocks
    again = convert_checkpoint(tmp_path / "to.pth", tmp_path / "again.pth", "ours")
    assert set(again.written) == ours.keys() - set(dropped) and not again.left_out
    assert again.source.name == ("original" if layout == "detectron2" else layout)


def test_one_of_several_backbones(tmp_path):
    torch.manual_seed(0)
    both = {"student.": "swin_nano", "teacher.": "dw_conv_nano"}
    content = {
        before + name: value
        for before, model in both.items()
        for name, value in timm.create_model(model, num_classes=0).state_dict().items()
    }
    torch.save(content, tmp_path / "both.pth")
    for before, model in both.items():
        target = tmp_path / f"{before}pt"
        done = convert_checkpoint(tmp_path / "both.pth", target, "ours", from_prefix=before)
        assert f"{done.family}_nano" == model
        for name, value in torch.load(target, weights_only=True).items():
            assert value.equal(content[before + name])


@pytest.mark.parametrize(
    "layout, target, lacks, message",
    [
        ("caffe", "a.pth", "", "no layout 'caffe': ours, original, timm, torchvision, openmmlab, "),
        ("ours", "a.onnx", "", "a.onnx: .pth or .pt or .safetensors is needed"),
        ("ours", "a.pth", "patch_embed.", "from.pth holds no backbone of a family of this package"),
        ("ours", "a.pth", "stages.", "from.pth holds no backbone of a family of this package"),
    ],
)
def test_a_wrong_request_writes_nothing(layout, target, lacks, message, tmp_path):
    state = timm.create_model("swin_nano", num_classes=0).state_dict()
    kept = {k: v for k, v in state.items() if not (lacks and k.startswith(lacks))}
    torch.save(kept, tmp_path / "from.pth")
    with pytest.raises((ValueError, backbones.CheckpointError), match=message):
        convert_checkpoint(tmp_path / "from.pth", tmp_path / target, layout)
    assert [path.name for path in tmp_path.iterdir()] == ["from.pth"]


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize(
    "given, keys, meta",
    [
        ({}, None, {}),
        ({"wrapper": "model"}, {"model"}, {}),
        ({"classes": ("a", "b")}, {"state_dict", "meta"}, {"classes": ["a", "b"]}),
        ({"wrapper": "model", "meta": {"n": 3}}, {"model", "meta"}, {"n": 3}),
        (
            {"classes": ["a"], "meta": {"classes": ["b"], "o": {"x": None}}},
            {"state_dict", "meta"},
            {"classes": ["a"], "o": {"x": None}},
        ),
    ],
)
def test_weights_are_written_as_they_are(given, keys, meta, suffix, tmp_path, monkeypatch):
    """A parameter, a view in another order and what two names share; beside the old file first."""
    table = torch.arange(6.0).reshape(2, 3)
    weights = {"a": torch.nn.Parameter(table), "b": table.T, "c": table, "d": table[:, 1:]}
    path, moved = tmp_path / f"folder/a{suffix}", []
    replace = os.replace
    monkeypatch.setattr(os, "replace", lambda *paths: moved.append(paths) or replace(*paths))
    write_weights(str(path), weights, **given)
    assert moved == [(path.with_name(f"a{suffix}.partial"), path)]
    assert list(path.parent.iterdir()) == [path]
    if suffix == ".pth":
        found = torch.load(path, weights_only=True)
        if keys is not None:
            assert found.keys() == keys and found.get("meta", {}) == meta
            found = found[given.get("wrapper", "state_dict")]
    else:
        content = read_content(path)
        assert content["meta"] == meta | {"format": "pt"}
        found = content["state_dict"]
    assert found.keys() == weights.keys()
    for name, value in found.items():
        assert type(value) is torch.Tensor and value.equal(weights[name]), name
        assert value.is_contiguous() and not value.requires_grad
        assert value.untyped_storage().nbytes() == 4 * value.numel()


def test_safetensors_of_the_same_weights_are_the_same_bytes(tmp_path):
    """The library draws the order of the metadata anew: published names, hashes, changed too."""
    weights = {"b.weight": torch.randn(3, 5), "a": torch.arange(4), "größe": torch.ones(())}
    meta = {name: [name, '"é\n'] for name in ("model", "classes", "mean", "std", "recipe")}
    content = set()
    for n in range(8):
        path = tmp_path / f"{n}.safetensors"
        write_weights(path, weights, meta=meta)
        content.add(path.read_bytes())
    assert len(content) == 1
    with safe_open(path, "pt") as file:
        expected = {"format": "pt"} | {name: json.dumps(value) for name, value in meta.items()}
        assert file.metadata() == expected
        assert set(file.keys()) == set(weights)
        assert all(file.get_tensor(name).equal(value) for name, value in weights.items())
