"""The page of the data before a training, and the report after it."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dense import journal
from dense.recipes import RECIPES
from tests.pages import Page
from tests.segmentation.test_tools import FAST, own_data
from tests.support import load_tool

pytestmark = pytest.mark.slow

CONFIG = RECIPES / "segmentation/dw_conv_nano_upernet.py"


def browse(out: Path, *arguments) -> Page:
    tool = load_tool("browse_data")
    tool.main(["train_segmentor", "--out", str(out), *map(str, arguments)])
    return Page(out.read_text())


def test_browsing_counts_as_numpy(shapes, tmp_path):
    folders = {}
    for split in ("train", "val"):
        for kind in ("images", "masks"):
            folder = tmp_path / kind / split
            folder.mkdir(parents=True)
            folders[f"{split}_{kind}"] = str(folder)
            for path in Path(shapes[f"{split}_{kind}"]).iterdir():
                (folder / path.name).write_bytes(path.read_bytes())
    Image.fromarray(np.full((64, 80), 9, np.uint8)).save(tmp_path / "masks/train/0.png")
    Image.fromarray(np.zeros((64, 70), np.uint8)).save(tmp_path / "masks/train/1.png")
    (tmp_path / "images/val/0.jpg").write_bytes((tmp_path / "images/train/2.jpg").read_bytes())
    arguments = own_data({**folders, "classes": "<i>ground</i>,box,bar,none"})
    page = browse(tmp_path / "data.html", CONFIG, *arguments, "--images", "4")
    assert page.is_self_contained and "<i>ground</i>" in page.text

    for column, split in ((0, "train"), (2, "val")):
        masks = [np.asarray(Image.open(p)) for p in Path(folders[f"{split}_masks"]).iterdir()]
        counts = np.bincount(np.concatenate([m.ravel() for m in masks]), minlength=10)
        for index, name in enumerate(("<i>ground</i>", "box", "bar", "none")):
            share, present = page.row(name)[column : column + 2]
            assert float(share) == pytest.approx(100 * counts[index] / counts[:4].sum(), abs=0.006)
            assert int(present) == sum((m == index).any() for m in masks)
        assert page.row("pixels in them")[column // 2] == f"{sum(m.size for m in masks):,}"
    order = [row[0] for row in page.rows if row and row[0] in ("<i>ground</i>", "box", "bar")]
    assert order == ["<i>ground</i>", "box", "bar"], "the most frequent first"
    odd = "\n".join(page.lines)
    assert "masks/train/0.png holds 9: 4 classes are 0 to 3" in odd
    assert "masks/train/1.png is 70x64, its photo 80x64" in odd
    assert "1 are training photos too" in odd
    assert "no pixel of these masks is of none" in odd


def test_browsing_reads_coloured_masks_as_the_training(shapes, tmp_path):
    colours = np.array([[10, 20, 30], [200, 0, 0], [0, 200, 0]], np.uint8)
    folders = dict(shapes)
    for split in ("train", "val"):
        folder = tmp_path / split
        folder.mkdir()
        for path in Path(shapes[f"{split}_masks"]).iterdir():
            Image.fromarray(colours[np.asarray(Image.open(path))]).save(folder / path.name)
        folders[f"{split}_masks"] = str(folder)
    names = ("ground", "box", "bar")
    lines = [f"{name} {' '.join(map(str, c))}" for name, c in zip(names, colours, strict=True)]
    (tmp_path / "classes.txt").write_text("\n".join(lines))
    folders["classes"] = str(tmp_path / "classes.txt")
    page = browse(tmp_path / "data.html", CONFIG, *own_data(folders), "--images", "2")
    plain = browse(tmp_path / "plain.html", CONFIG, *own_data(shapes), "--images", "2")
    assert all(page.row(name) == plain.row(name) for name in names)
    assert all(f"rgb({', '.join(map(str, colour))})" in page.source for colour in colours.tolist())


def test_browsing_shows_what_the_pipeline_makes(shapes, tmp_path):
    arguments = [CONFIG, *own_data(shapes), "--images", "6"]
    page = browse(tmp_path / "short.html", *arguments, "--short-side", "40")
    training = [caption.partition(": ")[2] for caption in page.captions[:6]]
    assert len(set(training)) > 1 and all(
        max(map(int, size.split("x"))) <= 40 for size in training
    ), "cropped to 40 after a random scale"
    validation = page.captions[6:]
    assert validation and all("50x40" in caption for caption in validation)
    again = browse(tmp_path / "again.html", *arguments, "--short-side", "40")
    for one, two in zip(page.pictures, again.pictures, strict=True):
        np.testing.assert_array_equal(one, two)


def test_browsing_ade20k_itself(ade_layout, shapes, tmp_path):
    """Its masks' 0 is no class, and 1 the first."""
    page = browse(tmp_path / "page.html", CONFIG, "--data-root", ade_layout, "--images", "2")
    masks = [np.asarray(Image.open(path)) for path in Path(shapes["train_masks"]).iterdir()]
    counts = np.bincount(np.concatenate([mask.ravel() for mask in masks]))
    for name, index in (("wall", 1), ("building", 2)):
        share, present = page.row(name)[:2]
        assert float(share) == pytest.approx(100 * counts[index] / counts[1:].sum(), abs=0.006)
        assert int(present) == len(masks)
    assert page.row("classes") == ["150", "150"] and len(page.pictures) == 2 + 1


def test_browsing_draws_classes_over_photos(tmp_path):
    """A photo of one colour: as it is where its mask is ignored."""
    colour = (200, 100, 20)
    mask = np.full((64, 80), 255, np.uint8)
    mask[:, :40] = 1
    folders = {"classes": "ground,box"}
    for split in ("train", "val"):
        for kind, pixels in (("images", np.full((64, 80, 3), colour, np.uint8)), ("masks", mask)):
            folder = tmp_path / split / kind
            folder.mkdir(parents=True)
            Image.fromarray(pixels).save(folder / "a.png")
            folders[f"{split}_{kind}"] = str(folder)
    page = browse(tmp_path / "page.html", CONFIG, *own_data(folders), "--images", "2")
    training, validation = (picture.astype(int) for picture in page.pictures)
    width = validation.shape[1]
    drawn, plain = validation[:, : width // 2 - 9], validation[:, width // 2 + 9 :]
    assert np.abs(plain - colour).max() < 20 and np.abs(drawn - colour).max(2).min() > 20
    # Mirrored or not.
    assert 0.2 < (np.abs(training - colour).max(2) < 20).mean() < 0.8


def test_a_training_ends_with_its_report(shapes, tmp_path, monkeypatch, reports):
    work = tmp_path / "mine"
    arguments = [CONFIG, "--work-dir", work, *own_data(shapes), "--short-side", "64"]
    arguments += ["--cfg-options", *FAST, "train_cfg.val_interval=1"]
    monkeypatch.setattr(sys, "argv", ["train_segmentor.py", *map(str, arguments)])
    load_tool("train_segmentor").main()

    (log,) = work.glob("*/*.log")
    line = "in float32: 2 steps of 2 of 6 images (0.667 epochs), random weights"
    assert line in log.read_text()
    (start,) = json.loads((work / journal.FILE).read_text())
    assert start["seconds"] > 0 and start["config"] == str(CONFIG.absolute())

    page = Page((work / "report.html").read_text())
    assert page.is_self_contained
    assert page.row("train_cfg.max_iters")[1] == "2"
    (scalars,) = work.glob("*/vis_data/scalars.json")
    validated = json.loads(scalars.read_text().splitlines()[-1])
    assert float(page.row("mIoU")[0]) == pytest.approx(validated["mIoU"], abs=0.006)
    # The mean of the classes' IoU, in percent, is the mIoU.
    classes = [float(page.row(name)[0]) for name in ("ground", "box", "bar")]
    assert np.mean(classes) == pytest.approx(validated["mIoU"], abs=0.02)
    assert page.captions == ["photo", "truth", "prediction"] * 2
    assert "best 1" in page.text and "worst 1" in page.text

    # Without a checkpoint the rest is there.
    for checkpoint in work.glob("*.pth"):
        checkpoint.unlink()
    assert load_tool("report").main([str(work), "--out", str(tmp_path / "other.html")]) == 0
    page = Page((tmp_path / "other.html").read_text())
    assert "there is no checkpoint yet" in page.text and not page.pictures
