"""The picture of a network's mixing weights: every panel, the positions, and what is asked for."""

import argparse
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from matplotlib.colors import to_rgba
from PIL import Image
from torch import nn

from tests.support import load_tool

WORDS = ["photo.png", "--model", "swin_nano", "--checkpoint", "weights.pth"]


@pytest.fixture(scope="module")
def tool():
    return load_tool("show_kernels")


def test_options(tool, tmp_path):
    assert vars(tool.parse_args(WORDS)) == {
        **dict(photo=Path("photo.png"), model="swin_nano", ablation=None, checkpoint="weights.pth"),
        **dict(stage=2, block=1, at=None, channels=4, short_side=224, out=Path("kernels.png")),
    }
    words = ["--ablation", "row", "--stage", "3", "--block", "5", "--at", "1,2.5", "3,4"]
    words += ["--channels", "1", "--short-side", "1", "--out", str(tmp_path / "a.png")]
    assert vars(tool.parse_args([*WORDS, *words])) == {
        **dict(photo=Path("photo.png"), model="swin_nano", ablation="row", stage=3, block=5),
        **dict(checkpoint="weights.pth", at=[(1, 2.5), (3, 4)], channels=1, short_side=1),
        **dict(out=tmp_path / "a.png"),
    }


@pytest.mark.parametrize(
    "words, message",
    [
        (WORDS[1:], "the following arguments are required: photo"),
        ([WORDS[0], *WORDS[3:]], "the following arguments are required: --model"),
        (WORDS[:3], "the following arguments are required: --checkpoint"),
        ([*WORDS, "--channels", "0"], "error: --channels 0: 1 or more is needed"),
        ([*WORDS, "--short-side", "0"], "error: --short-side 0: 1 or more is needed"),
        ([*WORDS, "--at", "5"], "argument --at: invalid _point value: '5'"),
        ([*WORDS, "--out", "none/a.png"], "error: --out none/a.png: there is no folder"),
    ],
)
def test_requests_that_are_refused(tool, words, message, capsys):
    with pytest.raises(SystemExit):
        tool.parse_args(words)
    assert message in " ".join(capsys.readouterr().err.split())


def test_the_help(tool, capsys):
    with pytest.raises(SystemExit):
        tool.parse_args(["--help"])
    shown = capsys.readouterr().out
    assert tool.__doc__ in shown
    for words in ("--ablation NAME", "--at X,Y [X,Y ...]", "4 to 32 pixels (2)", "(kernels.png)"):
        assert words in shown


# What is drawn


class Network(nn.Module):
    """Notes the mixers that run."""

    def __init__(self):
        super().__init__()
        block = lambda: nn.ModuleDict({"mixer": nn.Identity()})  # noqa: E731
        stages = [nn.ModuleList(block() for _ in range(n)) for n in (2, 1, 3)]
        self.stages = nn.ModuleList(nn.ModuleDict({"blocks": blocks}) for blocks in stages)
        for stage in self.stages:
            stage.blocks = stage["blocks"]
            for one in stage.blocks:
                one.mixer = one["mixer"]

    def forward_features(self, x):
        for stage in self.stages:
            for block in stage.blocks:
                x = block.mixer(x) + 1
        return x


@pytest.mark.parametrize("stage, block, rounds", [(1, 1, 0), (1, 2, 1), (2, 1, 2), (3, 3, 5)])
def test_the_mixer_of_a_block_and_its_input(tool, stage, block, rounds):
    model, pixels = Network(), torch.zeros(2, 3, 4)
    mixer, x = tool.mixer_and_input(model, pixels, stage, block)
    assert mixer is model.stages[stage - 1].blocks[block - 1].mixer
    assert x.equal(torch.full((3, 4), float(rounds))) and not mixer._forward_pre_hooks


@pytest.mark.parametrize(
    "stage, block, message",
    [
        (0, 1, "--stage 0: 1 to 3 exist"),
        (4, 1, "--stage 4: 1 to 3 exist"),
        (3, 0, "--block 0: stage 3 has blocks 1 to 3"),
        (3, 4, "--block 4: stage 3 has blocks 1 to 3"),
        (2, 2, "--block 2: stage 2 has blocks 1 to 1"),
    ],
)
def test_blocks_that_do_not_exist(tool, stage, block, message):
    with pytest.raises(ValueError, match=message):
        tool.mixer_and_input(Network(), torch.zeros(2, 3, 4), stage, block)
    with pytest.raises(ValueError, match="Linear is no pyramid: its blocks have no mixers to draw"):
        tool.mixer_and_input(nn.Linear(1, 1), torch.zeros(1), 1, 1)


def test_the_image_that_a_network_sees(tool):
    """The shorter side scaled, antialiased; each channel by its mean and deviation."""
    noise = np.random.default_rng(0).integers(0, 255, (40, 60, 3), dtype=np.uint8)
    cfg = {"mean": (0.1, 0.2, 0.3), "std": (0.5, 0.25, 2.0)}
    found = tool.network_input(noise, 20, cfg)
    scaled = np.asarray(Image.fromarray(noise).resize((30, 20), Image.Resampling.BILINEAR))
    expected = (scaled / 255 - cfg["mean"]) / cfg["std"]
    assert found.shape == (1, 3, 20, 30) and found.dtype == torch.float32
    np.testing.assert_allclose(found[0].permute(1, 2, 0), expected, atol=1e-5)


def test_weights_of_cells_and_channels(tool):
    """Of a mixer whose output at a position is a known sum of its input."""
    factors = torch.randn(5, 7, 3)

    class Mixer(nn.Module):
        def forward(self, x):
            return x.flip(1, 2) * factors + x.roll(1, -1)

    found = tool.mixing_weights(Mixer(), torch.zeros(5, 7, 3), [(0, 1), (4, 2)], [2, 0])
    expected = np.zeros((2, 2, 5, 7), np.float32)
    for i, (row, column) in enumerate([(0, 1), (4, 2)]):
        for j, channel in enumerate([2, 0]):
            expected[i, j, 4 - row, 6 - column] = factors[row, column, channel]
    assert isinstance(found, np.ndarray)
    np.testing.assert_allclose(found, expected)


def test_positions_channels_and_the_network(tool, tmp_path, monkeypatch):
    """A photo of 40x60 pixels, seen at 32x48: a stage's map of 8x12 has 5 pixels a position."""
    pixels = np.random.default_rng(0).integers(0, 255, (40, 60, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "photo.png")
    torch.manual_seed(0)
    torch.save(timm.create_model("dw_conv_nano").state_dict(), tmp_path / "weights.pth")
    given, drawn, real = [], [], tool.mixing_weights
    monkeypatch.setattr(
        tool, "mixing_weights", lambda *given_: given.append(given_) or real(*given_)
    )
    monkeypatch.setattr(tool, "picture", lambda *given_: drawn.append(given_))
    words = [str(tmp_path / "photo.png"), "--model", "dw_conv_nano", "--short-side", "32"]
    words += ["--checkpoint", str(tmp_path / "weights.pth"), "--stage", "1", "--channels", "3"]
    for at, cells in (
        ([], [(5, 3), (4, 6), (2, 8)]),
        (["--at", "0,0", "59.9,39.9", "4.9,5"], [(0, 0), (7, 11), (1, 0)]),
    ):
        assert tool.main([*words, *at]) == 0
        mixer, x, places, channels = given[-1]
        assert x.shape[:2] == (8, 12) and places == cells
        assert channels == [(2 * i + 1) * x.shape[-1] // 6 for i in range(3)]
        image, scale, *rest, weights, args = drawn[-1]
        assert (image == pixels).all() and scale == 5 and rest == [cells, channels]
        assert weights.shape == (3, 3, 8, 12) and args.stage == 1
        assert not mixer.training and not any(p.requires_grad for p in mixer.parameters())
    # The checkpoint's weights, not new ones.
    kernel = next(p for p in mixer.parameters() if p.shape[-2:] == (7, 7))
    held = torch.load(tmp_path / "weights.pth").values()
    assert any(value.shape == kernel.shape and value.equal(kernel) for value in held)
    for point in ("-1,0", "60,0", "0,40", "0,-0.5"):
        assert tool.main([*words, f"--at={point}"]) == 1


def test_every_panel(tool, tmp_path, figures, monkeypatch):
    """Two positions and two channels on a map of 4x6 positions, 10 pixels each."""
    image = np.zeros((40, 60, 3), np.uint8)
    weights = np.zeros((2, 2, 4, 6), np.float32)
    weights[0, 0, 1:3, 2:4] = [[1, -2], [0.5, 0.25]]
    weights[0, 1, 0, 2] = 0.125  # the window is of both channels
    weights[1, 1, 3, 5] = -4
    args = argparse.Namespace(
        **dict(model="swin_nano", ablation=None, stage=3, block=2, out=tmp_path / "a.png")
    )
    tool.picture(image, 10.0, [(1, 2), (3, 5)], [7, 30], weights, args)
    [figure] = figures
    assert Image.open(args.out).size == (858, 572)
    assert figure._suptitle.get_text() == "swin_nano, stage 3, block 2"
    assert figure._suptitle.get_fontsize() == 10
    panels = np.array(figure.axes).reshape(2, 3)
    boxes = [(10, -10, 50, 40), (40, 20, 70, 50)]  # left, top, right, bottom
    titles = [["x 25, y 15", "channel 7, to 2", "channel 30, to 0.12"]]
    titles += [["x 55, y 35", "channel 7, to 1", "channel 30, to 4"]]
    for row, (line, (left, top, right, bottom)) in enumerate(zip(panels, boxes, strict=True)):
        [patch] = line[0].patches
        assert patch.get_bbox().bounds == (left, top, right - left, bottom - top)
        assert (patch.get_fill(), patch.get_linewidth()) == (False, 1.5)
        assert patch.get_edgecolor() == to_rgba("yellow")
        assert len(line[0].images) == 1 and [a.get_title() for a in line] == titles[row]
        for axes in line:
            assert axes.title.get_fontsize() == 8
            assert (axes.images[0].get_array() == image).all()
            [cross] = axes.lines
            point = [(25, 15), (55, 35)][row]
            assert tuple(np.ravel(cross.get_data())) == point and cross.get_marker() == "+"
            assert (cross.get_markersize(), cross.get_markeredgewidth()) == (9, 1.5)
            assert cross.get_color() == "yellow"
            assert not len(axes.get_xticks()) and not len(axes.get_yticks())
        used = abs(weights[row]).max(0) > 0
        for axes, values in zip(line[1:], weights[row], strict=True):
            shown = axes.images[1]
            most = abs(values).max() or 1
            assert shown.get_clim() == (-most, most) and shown.get_alpha() == 0.65
            assert shown.get_extent() == [0, 60, 40, 0] and shown.cmap.name == "RdBu_r"
            found = shown.get_array()
            assert (found.mask == ~used).all() and (found.data[used] == values[used]).all()
            assert axes.get_xlim() == (left, right) and axes.get_ylim() == (bottom, top)
            assert not axes.patches
    args.ablation, args.out = "swin_sliding", tmp_path / "a.pdf"
    tool.picture(image, 10.0, [(1, 2), (3, 5)], [7, 30], weights, args)
    assert figures[1]._suptitle.get_text() == "swin_nano, swin_sliding, stage 3, block 2"
    assert args.out.read_bytes().startswith(b"%PDF")
    args.out = tmp_path / "plain"
    tool.picture(image, 10.0, [(1, 2), (3, 5)], [7, 30], weights, args)
    assert args.out.read_bytes().startswith(b"\x89PNG")
    # Nothing stays open, nor overlaps.
    import matplotlib.pyplot as plt

    assert not plt.get_fignums()
    assert figure.subplotpars.wspace < 0.2 and figure.subplotpars.left < 0.05
