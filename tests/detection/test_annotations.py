"""Every entry of a COCO-style JSON that cannot be trained on is found, named and can be dropped."""

import copy
import re

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_masks

from dense.detection import annotations
from dense.detection.annotations import described, faults, without

NAN, INF = float("nan"), float("inf")


@pytest.fixture
def folder(tmp_path):
    """A photo of 40x30 pixels and one that its EXIF orientation turns to 20x50."""
    Image.new("RGB", (40, 30)).save(tmp_path / "a.jpg")
    turned = Image.new("RGB", (50, 20))
    exif = turned.getexif()
    exif[274] = 6
    turned.save(tmp_path / "b.jpg", exif=exif)
    (tmp_path / "text.jpg").write_text("no image")
    return tmp_path


def good() -> dict:
    mask = np.zeros((30, 40), np.uint8, order="F")
    mask[3:20, 5:9] = 1
    packed = coco_masks.encode(mask)
    runs = np.flatnonzero(np.diff(np.r_[0, mask.T.ravel(), 1 - mask[-1, -1]])).tolist()
    return {
        "images": [
            {"id": 1, "file_name": "a.jpg", "width": 40, "height": 30},
            {"id": 2, "file_name": "b.jpg", "width": 20, "height": 50},
        ],
        "categories": [{"id": 5, "name": "bar"}],
        "annotations": [
            dict(id=1, image_id=1, category_id=5, bbox=[0, 0, 40, 30.4], iscrowd=0),
            dict(id=2, image_id=2, category_id=5, bbox=[1, 40, 5, 10],
                 segmentation=[[1, 40, 6, 40, 6, 50]]),
            dict(id=3, image_id=1, category_id=5, bbox=[5, 3, 4, 17], iscrowd=1,
                 segmentation={"size": [30, 40], "counts": packed["counts"].decode()}),
            dict(id=4, image_id=1, category_id=5, bbox=[5, 3, 4, 17],
                 segmentation={"size": [30, 40], "counts": np.diff([0, *runs]).tolist()}),
        ],
    }  # fmt: skip


def test_good_entries_have_no_fault(folder):
    assert faults(good(), folder) == []


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (dict(bbox=[1, 1, -4, 5]), r"bbox=\[1, 1, -4, 5\]: w and h above 0"),
        (dict(bbox=[1, 1, 0, 5]), "w and h above 0"),
        (dict(bbox=[1, 1, NAN, 5]), r"bbox=\[1, 1, nan, 5\]: four finite numbers"),
        (dict(bbox=[1, 1, INF, 5]), "four finite numbers"),
        (dict(bbox=["1", 1, 2, 5]), "four finite numbers"),
        (dict(bbox=[1, 1, 2]), "four finite numbers"),
        (dict(bbox=[1, 1, True, 5]), "four finite numbers"),
        (dict(bbox=None), "bbox=None: four finite"),
        (dict(bbox=[35, 1, 7, 5]), "leaves the 40x30 pixels"),
        (dict(bbox=[1, 28, 7, 5]), "leaves the 40x30 pixels"),
        (dict(bbox=[-3, 1, 7, 5]), "leaves the 40x30 pixels"),
        (dict(image_id=9), "image_id=9 is of no listed image"),
        (dict(image_id=None), "image_id=None is of no listed image"),
        (dict(category_id=9), "category_id=9 is of no listed category"),
        (dict(category_id=[5]), "of no listed category"),
        (dict(iscrowd=2), "iscrowd=2: 0 or 1"),
        (dict(id=None), "it has no id"),
        (dict(id=2), "id=2 is there 2 times"),
        (dict(id=1.5), "id=1.5: a whole number"),
        (dict(id="one"), "ids are mixed, 3 numbers and 1 texts"),
        (dict(segmentation=[[1, 1, 5, 5]]), "at least three points"),
        (dict(segmentation=[[1, 1, 5, 5, 2, 8, 9]]), "at least three points"),
        (dict(segmentation=[[1, 1, 5, 5, 9, 9]]), "has no area"),
        (dict(segmentation=[[1, 1, 5, 5, NAN, 9]]), "finite numbers"),
        (dict(segmentation=[[1, 1, 5, 5, "2", 9]]), "finite numbers"),
        (dict(segmentation=[[1, 1, 45, 1, 4, 9]]), "leaves the 40x30 pixels"),
        (dict(segmentation="polygon"), "a list of polygons, or an RLE"),
        (dict(segmentation=[1, 2, 3, 4, 5, 6]), "a list of polygons, or an RLE"),
        (dict(segmentation={"size": [40, 30], "counts": [1200]}), r"size=\[40, 30\]: \[30, 40\]"),
        (dict(segmentation={"size": [30, 40], "counts": [1201]}), "1201 pixels, of 1200"),
        (dict(segmentation={"size": [30, 40], "counts": [1300, -100]}), "covers 1200 pixels"),
        (dict(segmentation={"size": [30, 40], "counts": "PPY"}), "pixels, of 1200"),
        (dict(segmentation={"size": [30, 40], "counts": 5}), "a list of runs"),
    ],
)
def test_a_faulty_annotation(folder, change, reason):
    content = good()
    content["annotations"][0].update(change)
    found = faults(content, folder)
    assert found and found[0].kind == "annotation" and found[0].index == 0
    assert re.search(reason, found[0].reason), found[0].reason


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (dict(id=None), "it has no id"),
        (dict(id=2), "id=2 is there 2 times"),
        (dict(file_name=None), "file_name=None"),
        (dict(file_name="absent.jpg"), "there is no .*absent.jpg"),
        (dict(file_name="text.jpg"), "cannot be read as an image"),
        (dict(width="40"), "width='40': the photo's pixels"),
        (dict(height=0), "height=0: the photo's pixels"),
        (dict(width=41), "width, height=41, 30: a.jpg is 40x30$"),
        (
            dict(id=3, file_name="b.jpg", width=50, height=20),
            "50, 20: b.jpg is 20x50 .turned by its EXIF",
        ),
    ],
)
def test_a_faulty_image(folder, change, reason):
    content = good()
    content["images"][0].update(change)
    if "id" not in change:
        content["annotations"] = content["annotations"][1:2]
    found = [fault for fault in faults(content, folder) if fault.kind == "image"]
    assert found[0].index == 0
    assert re.search(reason, found[0].reason), found[0].reason


def test_entries_that_are_no_objects(folder):
    content = good()
    content["annotations"].append("text")
    content["images"].append(7)
    assert [f.reason for f in faults(content, folder)] == [
        "7 is not an object",
        "'text' is not an object",
    ]


def test_ten_are_described_and_all_are_counted(folder):
    content = good()
    content["annotations"] += [
        dict(content["annotations"][0], id=10 + n, bbox=[0, 0, -n, 4]) for n in range(14)
    ]
    found = faults(content, folder)
    text = described(found, "train.json")
    assert text.startswith("train.json: 14 annotations cannot be used: annotation 10: bbox=")
    assert text.count("w and h above 0") == 10 and text.endswith("; and 4 more")
    assert "\n" not in text


def test_faulty_entries_are_dropped_with_what_hangs_on_them(folder):
    content = good()
    content["images"][1]["width"] = 7
    content["annotations"][2]["bbox"] = [0, 0, 0, 0]
    kept = without(content, faults(content, folder))
    assert [image["id"] for image in kept["images"]] == [1]
    assert [annotation["id"] for annotation in kept["annotations"]] == [1, 4]
    assert faults(kept, folder) == []


def test_runs_are_pycocotools(folder):
    rng = np.random.default_rng(0)
    for size in ((30, 40), (1, 1), (7, 300), (400, 3)):
        mask = np.asfortranarray(rng.random(size) > rng.random(), dtype=np.uint8)
        mask = np.repeat(mask, 3, axis=1) if size[0] > 1 else mask
        mask = np.asfortranarray(mask)
        packed = coco_masks.encode(mask)
        runs = list(annotations._decoded(packed["counts"].decode()))
        assert sum(runs) == mask.size and sum(runs[1::2]) == mask.sum()


def test_the_json_is_not_changed(folder):
    content = good()
    content["annotations"][0]["bbox"] = [0, 0, -1, 4]
    before = copy.deepcopy(content)
    without(content, faults(content, folder))
    assert content == before
