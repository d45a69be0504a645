"""The page of the data before a training, and the report after it."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest

from dense import journal
from tests.pages import Page
from tests.pretraining.conftest import CONFIGS, write_images
from tests.support import load_tool


def browse(out: Path, *arguments) -> Page:
    load_tool("browse_data").main(["pretrain", "--out", str(out), *map(str, arguments)])
    return Page(out.read_text())


def test_browsing_counts_the_folders(tmp_path):
    photos = tmp_path / "photos"
    write_images(photos / "train", {"n01": 5, "<u>cat & dog": 3, "n03": 2})
    write_images(photos / "val", {"n01": 1, "<u>cat & dog": 2, "n03": 1}, seed=1)
    cut = photos / "train/n01/n01_0.jpg"
    cut.write_bytes(cut.read_bytes()[:300])
    config = CONFIGS / "dw_conv_nano.py"
    data = ["--data-root", photos, "--num-classes", 3]
    page = browse(tmp_path / "data.html", config, *data, "--images", "6")
    assert page.is_self_contained and "<u>cat & dog" in page.text
    for name in ("n01", "<u>cat & dog", "n03"):
        counts = [str(len(list((photos / split / name).iterdir()))) for split in ("train", "val")]
        assert page.row(name) == counts
    assert page.row("photos") == ["10", "4"]
    assert any("n01_0.jpg cannot be read" in line for line in page.lines)
    # The recipe's 64x64 crops.
    assert [picture.shape for picture in page.pictures[:6]] == [(64, 64, 3)] * 6
    # Each class is noise below 80, and 150 more in a channel of its own.
    names = ["n01", "<u>cat & dog", "n03"]
    for caption, picture in zip(page.captions[6:], page.pictures[6:], strict=True):
        means = np.delete(picture.mean((0, 1)), own := names.index(caption.partition(":")[0]))
        assert 160 < picture[..., own].mean() < 220 and max(means) < 80

    # The recipe of ImageNet mixes photos.
    config = CONFIGS / "dw_conv_tiny_8xb128-300e_in1k-224x224.py"
    mixed = browse(tmp_path / "mixed.html", config, *data, "--images", "6")
    assert mixed.captions.count("mixed") == 2 and "mixed" not in page.captions


@pytest.mark.slow
def test_a_training_ends_with_its_report(run, tmp_path, monkeypatch, reports):
    work = run()
    (log,) = work.glob("*/*.log")
    assert "in float32: 6 steps of 8 of 24 images (2 epochs), random weights" in log.read_text()
    page = Page((work / "report.html").read_text())
    assert page.is_self_contained
    assert page.row("train_cfg.max_epochs")[1] == "2"
    with open(work / "evaluation/per_class.csv", newline="") as file:
        for line in csv.DictReader(file):
            top1, images = page.row(line["class"])
            assert float(top1) == pytest.approx(float(line["top1"]), abs=0.006)
            assert images == line["images"] == "4"
    assert len(page.pictures) == 8 and sum("(truth)" in c for c in page.captions) == 8

    # The score is that of the true class, which may not be the best one.
    class Fake:
        classes = ("n01", "n02", "n03", "n04")

        def __init__(self, *_):
            pass

        def __call__(self, image):
            return np.array([0.7, 0.2, 0.06, 0.04])

    monkeypatch.setattr("dense.pretraining.reporting.Predictor", Fake)
    assert load_tool("report").main([str(work), "--out", str(tmp_path / "fake.html")]) == 0
    captions = Page((tmp_path / "fake.html").read_text()).captions
    assert [c.partition(": ")[2].split("_")[0] for c in captions] == ["n01"] * 4 + ["n03"] * 4
    # The three best, and the true class.
    assert all(", 70.0. n01 70% (truth), n02 20%, n03 6%" in c for c in captions[:4])
    assert all(", 6.0. n03 6% (truth), n01 70%, n02 20%" in c for c in captions[4:])
    assert not any("n04" in c for c in captions)

    # A second start is entered beside the first; initial weights are named with what they gave.
    (start,) = json.loads((work / journal.FILE).read_text())
    assert start["weights"] == "random weights" and start["seconds"] > 0
    other = run("--init", work / "epoch_2.pth", work_dir=tmp_path / "other")
    (start,) = json.loads((other / journal.FILE).read_text())
    weights = f"weights of {work / 'epoch_2.pth'}: "
    assert start["weights"].startswith(weights)
    matched, of, total = start["weights"].removeprefix(weights).split()[:3]
    assert of == "of" and matched == total
