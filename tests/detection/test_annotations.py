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


def annotated(folder, **change):
    content = good()
    content["annotations"] = [{**content["annotations"][0], **change}]
    return [fault.reason for fault in faults(content, folder)]


@pytest.mark.parametrize(
    "change",
    [
        *(
            dict(bbox=[-1, -1, 42, 32]),
            dict(bbox=[3, 4, 1e-9, 1e-9]),
            dict(bbox=[40.5, 30.5, 0.5, 0.5]),
        ),
        *(dict(segmentation=None), dict(segmentation=[]), dict(segmentation={})),
        dict(segmentation=[[-1, -1, 41, -1, 41, 31]]),
        # Just enough of an area, whichever way around; two polygons.
        dict(segmentation=[[0, 0, 1, 0, 0, 2e-6], [0, 0, 0, 2e-6, 1, 0]]),
        dict(segmentation={"size": [30, 40], "counts": [0, 1200]}),
        dict(segmentation={"size": [30, 40], "counts": [1200]}),
        *(dict(iscrowd=1), dict(iscrowd=0), dict(id=0), dict(id="text")),
    ],
)
def test_what_is_just_right(folder, change):
    assert annotated(folder, **change) == []


FOUR = "four finite numbers [x, y, w, h] are needed"
POINTS = "x and y of at least three points are needed, finite numbers"
OUTSIDE = "which leaves the 40x30 pixels of its image"
LONG = "segmentation has the polygon [0, 0, 1, 0, 0, 1.9e-06], which has no area"


@pytest.mark.parametrize(
    "change, reason",
    [
        *(
            (dict(bbox=box), f"bbox={box} leaves the 40x30 pixels of its image")
            for box in (
                *([-1.01, 0, 5, 5], [0, -1.01, 5, 5], [0, 0, 41.01, 5], [0, 0, 5, 31.01]),
                [36, 26, 6, 3],
            )
        ),
        (dict(bbox=[1, 1, 5, 0]), "bbox=[1, 1, 5, 0]: w and h above 0 are needed"),
        (dict(bbox=[1, 1, 5, -1]), "bbox=[1, 1, 5, -1]: w and h above 0 are needed"),
        (dict(bbox=[1, 1, 5, 5, 5]), f"bbox=[1, 1, 5, 5, 5]: {FOUR}"),
        (dict(bbox={"x": 1}), f"bbox={{'x': 1}}: {FOUR}"),
        (dict(segmentation=[[0, 0, 1, 0, 0, 1.9e-6]]), LONG),
        (
            dict(segmentation=[[1, 1, 9, 1, 1, 9], [2, 2]]),
            f"segmentation has the polygon [2, 2]: {POINTS}",
        ),
        (
            dict(segmentation=[[0, 0, 5, 0, 5, 31.5]]),
            f"segmentation has the polygon [0, 0, 5, 0, 5, 31.5], {OUTSIDE}",
        ),
        (
            dict(segmentation=[[0, 0, 41.5, 0, 5, 9]]),
            f"segmentation has the polygon [0, 0, 41.5, 0, 5, 9], {OUTSIDE}",
        ),
        (
            dict(segmentation={"size": [30, 40], "counts": [0.5, 1199.5]}),
            "segmentation.counts=[0.5, 1199.5]: a list of runs, or COCO's text, is needed",
        ),
        (
            dict(segmentation={"size": [30, 40], "counts": [0, 1199]}),
            "segmentation.counts covers 1199 pixels, of 1200 in 30x40",
        ),
        (
            dict(segmentation={"size": [30, 40], "counts": ""}),
            "segmentation.counts covers 0 pixels, of 1200 in 30x40",
        ),
        (dict(iscrowd=-1), "iscrowd=-1: 0 or 1 is needed"),
        (dict(id=True), "id=True: a whole number is needed"),
        # What is long is cut to 60 characters.
        (dict(image_id="x" * 57), f"image_id={'x' * 57!r} is of no listed image"),
        (dict(image_id="x" * 58), f"image_id='{'x' * 56}... is of no listed image"),
    ],
)
def test_what_is_just_wrong(folder, change, reason):
    assert annotated(folder, **change) == [reason]


@pytest.mark.parametrize(
    "change, reason",
    [
        (dict(file_name=""), "file_name='': a path below {folder} is needed"),
        (dict(file_name=5), "file_name=5: a path below {folder} is needed"),
        (dict(file_name="c.jpg"), "file_name='c.jpg': there is no {folder}/c.jpg"),
        (dict(width=True), "width=True: the photo's pixels are needed"),
        (dict(height=30.0), "height=30.0: the photo's pixels are needed"),
        (dict(width=0), "width=0: the photo's pixels are needed"),
        (dict(width=30, height=40), "width, height=30, 40: a.jpg is 40x30"),
        (dict(height=31), "width, height=40, 31: a.jpg is 40x30"),
    ],
)
def test_a_faulty_image_alone(folder, change, reason):
    """Its annotations go with it and are not named; one pixel is a photo too."""
    content = good()
    Image.new("RGB", (1, 1)).save(folder / "dot.png")
    content["images"].append({"id": 9, "file_name": "dot.png", "width": 1, "height": 1})
    content["images"][0].update(change)
    fault = annotations.Fault("image", 0, "image 1", reason.format(folder=folder))
    assert faults(content, folder) == [fault]


def test_ids_may_be_texts_but_not_both(folder):
    content = good()
    for entry in content["images"]:
        entry["id"] = f"i{entry['id']}"
    for entry in content["annotations"]:
        entry.update(id=f"a{entry['id']}", image_id=f"i{entry['image_id']}")
    assert faults(content, folder) == []
    content["images"][1]["id"] = 2
    said = "ids are mixed, 1 numbers and 1 texts: one type is needed"
    found = faults(content, folder)
    assert [(fault.name, fault.reason) for fault in found[:2]] == [
        ("image 'i1'", said),
        ("image 2", said),
    ]
    [other] = found[2:]
    assert other == ("annotation", 1, "annotation 'a2'", "image_id='i2' is of no listed image")
    content = good()
    content["annotations"][3]["id"] = 1
    assert [(f.index, f.reason) for f in faults(content, folder)] == [
        *((0, "id=1 is there 2 times"), (3, "id=1 is there 2 times")),
    ]


def test_how_many_are_described():
    def described_as(images, objects):
        found = [annotations.Fault("image", n, f"image {n}", "no") for n in range(images)]
        found += [
            annotations.Fault("annotation", n, f"annotation {n}", "no") for n in range(objects)
        ]
        return described(found, "a.json")

    assert described_as(1, 0) == "a.json: 1 image cannot be used: image 0: no"
    assert described_as(2, 1) == (
        "a.json: 2 images and 1 annotation cannot be used: image 0: no; image 1: no; "
        "annotation 0: no"
    )
    assert described_as(10, 0).endswith("image 9: no")
    assert described_as(9, 2).endswith("; annotation 0: no; and 1 more")


def test_every_run_of_a_packed_mask():
    rng = np.random.default_rng(1)
    for size in ((30, 40), (1, 1), (2, 3), (700, 300)):
        mask = np.asfortranarray(rng.random(size) > 0.999 * rng.random(), dtype=np.uint8)
        for given in (mask, np.zeros_like(mask), np.ones_like(mask)):
            packed = coco_masks.encode(np.asfortranarray(given))["counts"].decode()
            flat = given.ravel(order="F")
            changes = np.flatnonzero(np.diff(np.r_[0, flat]))
            expected = np.diff(np.r_[0, changes, flat.size]).tolist()
            assert list(annotations._decoded(packed)) == expected
    assert list(annotations._decoded(packed[:-1] + "P")) == [-1], "it ends inside of a number"
