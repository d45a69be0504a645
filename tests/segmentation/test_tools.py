"""The command lines: own data by naming it, one line for what is wrong, figures that agree."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import backbones
from dense.recipes import RECIPES
from dense.segmentation import load_predictor

CONFIG = RECIPES / "segmentation/dw_conv_nano_upernet.py"
FAST = [
    "train_dataloader.num_workers=0",
    "train_dataloader.persistent_workers=False",
    "val_dataloader.num_workers=0",
    "val_dataloader.persistent_workers=False",
    "test_dataloader.num_workers=0",
    "test_dataloader.persistent_workers=False",
    "train_cfg.max_iters=2",
    "train_dataloader.batch_size=2",
]


def run(monkeypatch, tool, *args):
    monkeypatch.setattr(sys, "argv", ["tool", *map(str, args)])
    tool.main()


def own_data(shapes):
    return [arg for key, value in shapes.items() for arg in (f"--{key.replace('_', '-')}", value)]


def last_miou(path):
    return json.loads(path.read_text().splitlines()[-1])["mIoU"]


def test_train_test_and_predict_agree(monkeypatch, tools, shapes, tmp_path):
    work, out = tmp_path / "work", tmp_path / "out"
    run(
        *(monkeypatch, tools.train, CONFIG, "--work-dir", work, *own_data(shapes)),
        *("--short-side", "64", "--cfg-options", *FAST),
    )
    config, checkpoint = work / CONFIG.name, work / "iter_2.pth"
    before = config.read_text()
    run(
        *(monkeypatch, tools.test, config, checkpoint, "--out", out),
        *("--show-dir", tmp_path / "shown"),
    )
    assert config.read_text() == before
    (validated,) = work.glob("*/vis_data/scalars.json")
    (tested,) = (work / "test").glob("*/*.json")
    assert last_miou(tested) == pytest.approx(last_miou(validated), abs=0.01)
    assert len(list((tmp_path / "shown").rglob("*.png"))) == 2

    predict = load_predictor(str(config), str(checkpoint))
    assert predict.classes == ("ground", "box", "bar") and len(predict.palette) == 3
    for image in Path(shapes["val_images"]).iterdir():
        labels = predict(np.asarray(Image.open(image).convert("RGB")))
        assert labels.shape == (64, 80) and labels.dtype == np.int32
        written = np.asarray(Image.open(out / f"{image.stem}.png"))
        np.testing.assert_array_equal(labels, written)
    with pytest.raises(ValueError, match=r"\(H, W, 3\), uint8"):
        predict(np.zeros((64, 80), np.uint8))


@pytest.mark.slow
def test_a_row_of_the_ablations(monkeypatch, tools, shapes, tmp_path):
    work = tmp_path / "work"
    run(
        *(monkeypatch, tools.train, CONFIG, "--work-dir", work, *own_data(shapes)),
        *("--ablation", "dw_conv_positions_own", "--short-side", "64", "--cfg-options", *FAST),
    )
    predict = load_predictor(str(work / CONFIG.name), str(work / "iter_2.pth"))
    weights = backbones.read_checkpoint(work / "iter_2.pth")
    kernels = weights["backbone.stages.1.blocks.0.mixer.kernels"]
    assert kernels.shape == (28, 28, 2, 1, 7, 7)
    assert predict(np.zeros((64, 80, 3), np.uint8)).shape == (64, 80)


@pytest.mark.parametrize(
    "args, message",
    [
        (["nowhere.py"], "no config file at nowhere.py"),
        ([CONFIG], "no folder data/ade/ADEChallengeData2016/images/training"),
        ([CONFIG, "--data-root", "/elsewhere"], "no folder /elsewhere/images/training"),
        ([CONFIG, "--short-side", "16"], "--short-side 16: 32 or more is needed"),
        ([CONFIG, "--ablation", "volo_d1_dw_conv"], "--ablation: volo_d1_dw_conv is a class"),
        ([CONFIG, "--ablation", "dw_con_se"], "--ablation: no ablation 'dw_con_se'; near"),
        ([CONFIG, "--classes", "a,b"], "train_images, train_masks, val_images, val_masks not"),
    ],
)
def test_train_says_in_one_line_what_is_wrong(monkeypatch, tools, tmp_path, args, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as exited:
        run(monkeypatch, tools.train, *args)
    assert str(exited.value).startswith(f"train_segmentor: {message}")
    assert "\n" not in str(exited.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "option, message",
    [
        ("model.backbone.type=swin_huge", "swin_nano"),
        ("model.backbone.out_indices=[3,1]", "0, 1, 2, 3"),
        ("model.backbone.norm=GN", "BN, SyncBN, FrozenBN"),
        ("model.backbone.init=nowhere.pth", "init='nowhere.pth' is no file"),
    ],
)
def test_a_wrong_backbone_is_said_in_one_line(
    monkeypatch, tools, shapes, tmp_path, option, message
):
    with pytest.raises(SystemExit) as exited:
        run(
            *(monkeypatch, tools.train, CONFIG, "--work-dir", tmp_path, *own_data(shapes)),
            *("--cfg-options", *FAST, option),
        )
    assert message in str(exited.value) and "\n" not in str(exited.value)


def test_test_names_a_missing_checkpoint(monkeypatch, tools, ade_layout, tmp_path):
    with pytest.raises(SystemExit, match=r"test_segmentor: .*nowhere\.pth"):
        run(
            *(monkeypatch, tools.test, CONFIG, tmp_path / "nowhere.pth"),
            *("--data-root", ade_layout, "--cfg-options", *FAST[4:6]),
        )
