"""The page of the data before a training, and the report after it."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from detectron2.data.datasets.builtin_meta import COCO_CATEGORIES
from PIL import Image
from pycocotools.coco import COCO

from dense import journal
from dense.detection import reporting
from dense.drawing import class_colours
from dense.recipes import RECIPES
from tests.pages import Page
from tests.support import load_tool

NANO = str(RECIPES / "detection/cascade_mask_rcnn_dw_conv_nano.py")
SMALL = ["dataloader.train.num_workers=0", "dataloader.test.num_workers=0", "train.log_period=1"]


def browse(out: Path, *arguments: str) -> Page:
    load_tool("browse_data").main(["train_detector", "--out", str(out), *arguments])
    return Page(out.read_text())


def test_browsing_counts_as_pycocotools(coco_files, tmp_path, monkeypatch):
    # Where a training would write is not where browsing does.
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")

    def change(content):
        content["categories"][0]["name"] = "<b>bar</b>"
        content["annotations"][2]["iscrowd"] = 1
        content["annotations"][1]["bbox"] = [0, 0, 500, 5]

    coco_files.edit("train", change)
    coco_files.edit("val", lambda content: change(content))
    first = Path(coco_files.images("train"), "3.png")
    first.write_bytes(b"no photo")
    out = tmp_path / "pages/data.html"
    page = browse(out, "--config-file", NANO, *coco_files.arguments(), "--images", "4")
    assert page.is_self_contained and "<b>bar</b>" in page.text

    # The faulty entries are named, and the training leaves them out.
    assert any("image 3" in line and "3.png" in line for line in page.lines)
    assert any("annotation 2" in line and "[0, 0, 500, 5]" in line for line in page.lines)
    coco = COCO(coco_files.json("train"))
    left_out = set(coco.getAnnIds(imgIds=[3])) | {2}
    counts, photos = [], []
    for name in ("<b>bar</b>", "block"):
        ids = set(coco.getAnnIds(catIds=coco.getCatIds([name]), iscrowd=False)) - left_out
        counts.append(len(ids))
        photos.append(len({a["image_id"] for a in coco.loadAnns(list(ids))}))
        assert page.row(name)[:2] == [str(counts[-1]), str(photos[-1])]
    assert page.row("objects")[0] == str(sum(counts))
    assert len(page.pictures) == 4 + 2
    assert page.row("photo width, training") == page.row("photo width, validation") == ["128"] * 3
    assert sorted(Path(tmp_path / "pages").iterdir()) == [out]
    assert list(Path().iterdir()) == []


def test_browsing_shows_what_the_mapper_makes(coco_files, tmp_path):
    arguments = ["--config-file", NANO, *coco_files.arguments(), "--images", "6", "--seed", "3"]
    plain = [*arguments, "dataloader.train.mapper.augmentations=[]"]
    page = browse(tmp_path / "plain.html", *plain)
    assert all("128x96, 2 objects" in caption for caption in page.captions)
    augmented = browse(tmp_path / "augmented.html", *arguments)
    training = [c.partition(": ")[2] for c in augmented.captions[:6]]
    assert len(set(training)) > 1, "cropped and resized at random"
    again = browse(tmp_path / "again.html", *arguments)
    assert augmented.captions == again.captions
    for one, two in zip(augmented.pictures, again.pictures, strict=True):
        np.testing.assert_array_equal(one, two)


def test_browsing_coco_itself(coco_files, tmp_path, monkeypatch):
    """In the folder where Detectron2 looks for it, with its categories."""
    things = [{"id": c["id"], "name": c["name"]} for c in COCO_CATEGORIES if c["isthing"]]
    folder = tmp_path / "datasets/coco"
    (folder / "annotations").mkdir(parents=True)
    for split in ("train", "val"):
        coco_files.edit(split, lambda content: content.update(categories=things))
        (folder / f"{split}2017").symlink_to(coco_files.images(split))
        annotations = folder / f"annotations/instances_{split}2017.json"
        annotations.symlink_to(coco_files.json(split))
    monkeypatch.chdir(tmp_path)
    page = browse(tmp_path / "page.html", "--config-file", NANO, "--images", "2")
    # The ids 9 and 4 of the drawn objects.
    for name in ("boat", "motorcycle"):
        assert page.row(name) == ["6", "6", "2", "2"]
    assert page.row("person")[0] == "0" and page.row("classes") == ["80", "80"]
    assert len(page.pictures) == 2 + 1


@pytest.mark.parametrize("order", ["RGB", "BGR"])
def test_browsing_draws_objects_in_the_colours_of_their_classes(coco_files, tmp_path, order):
    arguments = ["--config-file", NANO, *coco_files.arguments(), "--images", "4"]
    arguments += ["dataloader.train.mapper.augmentations=[]"]
    arguments += [f"dataloader.train.mapper.image_format={order}"]
    page = browse(tmp_path / "page.html", *arguments)
    colours = dict(zip((4, 9), class_colours(2), strict=True))
    for split, pairs in (("train", slice(4)), ("val", slice(4, None))):
        truth = json.loads(Path(coco_files.json(split)).read_text())["annotations"]
        for caption, picture in zip(page.captions[pairs], page.pictures[pairs], strict=True):
            name = caption.partition(":")[0]
            photo = np.asarray(Image.open(Path(coco_files.images(split), name))).astype(int)
            scale = len(picture) / len(photo)
            bar, block = (a for a in truth if a["image_id"] == int(name.partition(".")[0]))
            # The block is drawn over the bar in the photo, as are their masks in either order.
            for one, other in ((bar, block), (block, bar)):
                x, y, w, h = one["bbox"]
                points = [(x + w * i // 8, y + h * j // 8) for i in (1, 7) for j in (2, 6)]
                left, top, width, height = other["bbox"]
                for px, py in points:
                    if left - 3 <= px <= left + width + 3 and top - 3 <= py <= top + height + 3:
                        continue
                    seen = picture[int((py + 0.5) * scale), int((px + 0.5) * scale)]
                    mixed = (photo[py, px] + np.array(colours[one["category_id"]])) / 2
                    assert np.abs(seen - mixed).max() < 45, (name, one["category_id"])


def test_browsing_refuses_in_one_line(coco_files, tmp_path, capsys):
    tool = load_tool("browse_data")
    for arguments, message in (
        (["--config-file", "absent.py"], "config file absent.py does not exist"),
        (["--config-file", NANO, "--train-json", "absent.json"], "there is no file absent.json"),
    ):
        with pytest.raises(SystemExit) as ended:
            tool.main(["train_detector", "--out", str(tmp_path / "a.html"), *arguments])
        assert message in str(ended.value) and "\n" not in str(ended.value)
    for arguments, message in (
        (["--images", "999"], "--images 999: 0 to 80"),
        (["--check", "-1"], "--check -1: 0 or more"),
        (["--out", "page.txt"], "--out page.txt: a .html"),
    ):
        with pytest.raises(SystemExit):
            tool.main(["train_detector", *arguments])
        assert message in capsys.readouterr().err


@pytest.mark.slow
def test_a_training_ends_with_its_report(coco_files, tmp_path, monkeypatch, reports):
    out = tmp_path / "mine"
    arguments = ["--config-file", NANO, "--output-dir", str(out), *coco_files.arguments(), *SMALL]
    arguments += ["train.max_iter=3", "optimizer.lr=0.0007", "train.seed=0"]
    monkeypatch.setattr(sys, "argv", ["train_detector.py", *arguments])
    load_tool("train_detector").main()

    log = (out / "log.txt").read_text()
    start = json.loads((out / journal.FILE).read_text())
    assert len(start) == 1 and start[0]["seconds"] > 0
    line = "in float32: 3 steps of 4 of 6 images (2 epochs), random weights"
    assert log.count(line) == 1 and log.index(line) < log.index("total_loss")

    page = Page((out / "report.html").read_text())
    assert page.is_self_contained and "optimizer.lr" in page.text
    assert page.row("optimizer.lr")[1] == "0.0007"
    assert page.row("train.max_iter")[1] == "3"
    assert page.tags.count("svg") >= 2
    # Detections as an evaluation leaves them: the first photo's are right, the second's are none.
    truth = json.loads(Path(coco_files.json("val")).read_text())["annotations"]
    found = [
        {key: a[key] for key in ("image_id", "category_id", "bbox")} | {"score": 0.9}
        for a in truth
        if a["image_id"] == 0
    ]
    (out / "inference").mkdir(exist_ok=True)
    (out / "inference/coco_instances_results.json").write_text(json.dumps(found))
    results = {"bbox": {"AP": 50.0, "AP-block": 25.0, "AP-bar": 75.5}}
    (out / "results.json").write_text(json.dumps(results))
    boxes, draw = [], reporting.drawn

    def noting(image, instances, colours):
        boxes.append(instances.gt_boxes.tensor.tolist())
        return draw(image, instances, colours)

    monkeypatch.setattr(reporting, "drawn", noting)
    assert load_tool("report").main([str(out), "--out", str(tmp_path / "other.html")]) == 0
    page = Page((tmp_path / "other.html").read_text())
    assert page.row("bar") == ["75.50"] and page.row("block") == ["25.00"]
    assert "by box AP50 on the image alone" in page.text
    assert "best 1: 0.png, 100.0" in page.text and "worst 1: 1.png, 0.0" in page.text
    assert page.captions == ["truth", "prediction"] * 2
    best_truth, best, worst_truth, worst = (p.astype(int) for p in page.pictures)
    assert np.abs(worst - worst_truth).max() > 60, "nothing is drawn where nothing was found"
    assert boxes[0] == boxes[1] and len(boxes[0]) == len(boxes[2]) == 2 and boxes[3] == []


def test_a_folder_without_a_training_has_no_report(tmp_path, capsys):
    report = load_tool("report")
    for folder, message in ((tmp_path / "absent", "there is no folder"), (tmp_path, "no config")):
        assert report.main([str(folder)]) == 2
        assert message in capsys.readouterr().err
