"""The chain from photos to detector and segmentor: its commands, its verdict, the whole of it."""

import json

import pytest

from tests.support import ROOT, load_tool, run_tool

pytest.importorskip("detectron2")
pytest.importorskip("mmseg")


@pytest.fixture(scope="module")
def tool():
    """``tools/demo_chain.py``."""
    return load_tool("demo_chain")


PLACES = dict.fromkeys(("photos", "ade", "out"), "folder") | {
    "d_dw_conv_nano": "d.pth",
    "i_d_dw_conv_nano": "i.pth",
}


def test_both_starts_differ_by_their_weights_alone(tool):
    steps = tool.downstream()
    assert len(steps) == 8
    for pretrained, random in zip(steps[::2], steps[1::2], strict=True):
        words = [step.argv(PLACES) for step in (pretrained, random)]
        more = [word for word in words[0] if word not in words[1]]
        file = "d.pth" if " d_dw" in pretrained.title else "i.pth"
        assert any(word.endswith(f".init={file}") for word in more)
        names = {word.replace("_pretrained", "_random") for word in more}
        assert len(names - set(words[1])) == 1


@pytest.mark.parametrize("phase", [0, 1])
def test_every_config_and_tool_is_there(tool, phase):
    steps = (tool.SCENES, *tool.pretraining(10)[phase], *tool.downstream())
    for step in steps:
        for word in step.argv(PLACES):
            if word.startswith(("tools/", "configs/")):
                assert (ROOT / word).is_file(), word


def test_parts_of_a_training(tool):
    points = [(step, float(step)) for step in range(4, 60, 5)]
    parts = tool.in_parts(points)
    assert len(parts) == tool.PARTS and parts == tuple(sorted(parts))
    assert sum(parts) / len(parts) == pytest.approx(sum(v for _, v in points) / len(points))
    won = tool.Contest("detector", "d_dw_conv_nano", 188, (3.0, 2.0), (3.1, 2.1))
    assert won.won
    # Ahead at the end alone, or level, is not enough.
    for losses in ((3.2, 2.0), (3.0, 2.1)):
        assert not tool.Contest("detector", "d_dw_conv_nano", 188, losses, (3.1, 2.1)).won


def test_what_is_not_a_full_match_is_refused(tool, tmp_path):
    import timm
    import torch

    import backbones  # noqa: F401

    network = timm.create_model("d_dw_conv_nano", num_classes=4)
    torch.save({"state_dict": network.state_dict()}, tmp_path / "whole.pth")
    matched = tool.full_match("d_dw_conv_nano", str(tmp_path / "whole.pth"))
    own = [k for k in network.state_dict() if k.startswith(("patch_embed.", "stages."))]
    assert matched == len(own)
    other = timm.create_model("d_dw_conv_nano", num_classes=4, window_size=5)
    torch.save({"state_dict": other.state_dict()}, tmp_path / "resized.pth")
    with pytest.raises(tool.StepError, match="not a full match"):
        tool.full_match("d_dw_conv_nano", str(tmp_path / "resized.pth"))


def test_missing_data_is_one_line(tool, tmp_path, capsys):
    (tmp_path / "photos/train/a").mkdir(parents=True)
    (tmp_path / "photos/val").mkdir()
    photos = ["--photos", str(tmp_path / "photos"), "--ade", "absent"]
    assert tool.main([*photos, "--out", str(tmp_path / "out")]) == 1
    said = capsys.readouterr().err
    assert said.startswith("demo_chain: --ade absent") and "images/training" in said
    assert said.count("\n") == 1


@pytest.mark.chain
def test_the_whole_chain(tool, sample_data, tmp_path):
    if not (sample_data / "tiny_imagenet_10").is_dir():
        pytest.skip("DENSE_SAMPLE_DATA has no tiny_imagenet_10/: no photos to pretrain on")
    done = run_tool("demo_chain", "--out", tmp_path)
    print(done.stdout[-2500:])
    assert done.returncode == 0, done.stderr[-3000:]
    contests = json.loads((tmp_path / "chain.json").read_text())
    assert {(c["head"], c["backbone"]) for c in contests} == {
        (head, name) for head in tool.HEADS for name in tool.BACKBONES
    }
    for contest in contests:
        assert contest["matched"] > 150
        for pretrained, random in zip(contest["pretrained"], contest["random"], strict=True):
            assert pretrained < random
    assert (tmp_path / "chain.png").read_bytes()[:4] == b"\x89PNG"
    suffixes = {path.suffix for path in (tmp_path / "published").iterdir()}
    assert suffixes == {".pth", ".safetensors"}
