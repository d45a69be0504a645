"""The converter: bits survive the way there and back, and bad requests cost nothing."""

import pickle

import pytest
import timm
import torch

import backbones
from backbones.layouts import LAYOUTS
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
