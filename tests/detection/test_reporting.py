"""What a report shows of a detector's validation, and a page of its data, of drawn photos."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from detectron2.structures import BitMasks, Boxes, BoxMode, Instances, PolygonMasks
from omegaconf import OmegaConf
from PIL import Image
from pycocotools import mask as coco_masks

from dense import browsing as pages_of_data
from dense import drawing, page
from dense.detection import browsing, reporting
from dense.detection.data import json_dataset
from dense.images import UnreadableImage


def test_the_classes_of_the_last_evaluation(tmp_path):
    assert reporting.per_class(tmp_path) is None
    found = tmp_path / "results.json"
    nan = float("nan")
    box = {"AP": 5.0, "AP50": 6.0, "AP-a": 25.0, "AP-b c": 75.5, "AP-d": nan}
    for content, table in (
        ("{", None),
        ({"bbox": {"AP": 1.0}}, None),
        ({}, None),
        (
            {"bbox": {**box, "AP-a": 0.0}},
            (["class", "box AP"], [["b c", 75.5], ["a", 0.0], ["d", None]]),
        ),
        (
            {"segm": {"AP-e": 100.0, "AP-a": 3.0}, "bbox": box},
            (
                ["class", "box AP", "mask AP"],
                [["b c", 75.5, None], ["a", 25.0, 3.0], ["d", None, None], ["e", None, 100.0]],
            ),
        ),
    ):
        found.write_text(content if isinstance(content, str) else json.dumps(content))
        expected = table and page.Table(
            table[0],
            [
                [name, *(page.Cell(v, share=(v or 0.0) / 100) for v in values)]
                for name, *values in table[1]
            ],
        )
        assert reporting.per_class(tmp_path) == expected


def drawn_boxes(monkeypatch) -> list:
    """What is drawn in place of a picture: the photo's size, boxes, classes, masks."""
    found = []

    def drawn(image, instances, colours):
        masks = (
            instances.gt_masks.tensor.sum((1, 2)).tolist() if instances.has("gt_masks") else None
        )
        boxes, classes = instances.gt_boxes.tensor.tolist(), instances.gt_classes.tolist()
        found.append((image.shape, boxes, classes, masks, list(colours)))
        return image

    monkeypatch.setattr(reporting, "drawn", drawn)
    return found


@pytest.fixture
def run(coco_files, tmp_path, monkeypatch):
    """A function of detections: the verdict on the two validation photos."""
    json_file, images = coco_files.json("val"), coco_files.images("val")
    named = tmp_path / "run"
    (named / "inference").mkdir(parents=True)

    def call(detections, images_=9, names=json_file):
        (named / "inference/coco_instances_results.json").write_text(json.dumps(detections))
        dataset = json_dataset(json_file, json_file, images, filter_empty=False)
        node = SimpleNamespace(names=names)
        cfg = SimpleNamespace(dataloader=SimpleNamespace(test=SimpleNamespace(dataset=node)))
        monkeypatch.setattr(
            reporting, "load_config", lambda p: cfg if p == str(named / "config.yaml") else 0
        )
        monkeypatch.setattr(
            reporting, "instantiate", lambda found: dataset if found is node else None
        )
        return reporting.judged(named, images_)

    return call


def truth_of(coco_files, image) -> list[dict]:
    content = json.loads(Path(coco_files.json("val")).read_text())
    return [a for a in content["annotations"] if a["image_id"] == image]


def found_as(entry, score, **change):
    keys = ("image_id", "category_id", "bbox")
    return {**{key: entry[key] for key in keys}, "score": score, **change}


def test_photos_are_judged_alone(coco_files, run, monkeypatch, capsys):
    with pytest.raises(FileNotFoundError, match="no evaluation has left its detections in infer"):
        reporting.judged(Path(coco_files.root), 4)

    def crowd(content):
        content["images"].append({"id": 7, "file_name": "1.png", "height": 96, "width": 128})
        content["images"].append({"id": 8, "file_name": "0.png", "height": 96, "width": 128})
        crowd = dict(content["annotations"][0], id=99, image_id=8, iscrowd=1)
        crowd["segmentation"] = {"size": [96, 128], "counts": [0, 96 * 128]}
        content["annotations"].append(crowd)

    coco_files.edit("val", crowd)
    bar, block = truth_of(coco_files, 0)
    other, _ = truth_of(coco_files, 1)
    near = [bar["bbox"][0] + 40, *bar["bbox"][1:]]
    detections = [
        *(found_as(bar, 0.9), found_as(block, 0.5)),
        # An IoU of 5/7.
        found_as(other, 0.49, bbox=[other["bbox"][0] + 10, *other["bbox"][1:]]),
        found_as(bar, 0.3, bbox=near),
    ]
    verdict = run(detections)
    # Photos of nothing but a crowd have no truth to compare with.
    assert [image.name for image in verdict.images] == ["0.png", "1.png"]
    assert [image.score for image in verdict.images] == pytest.approx([100, 50])
    assert verdict.measure == "box AP50 on the image alone"
    assert verdict.source == (
        "the detections of the last evaluation; those with a score of 0.5 and more are drawn"
    )
    assert verdict.colours == dict(zip(("block", "bar"), drawing.class_colours(2), strict=True))
    shown = drawn_boxes(monkeypatch)
    for image in verdict.images:
        assert list(image.pictures) == ["truth", "prediction"]
        for draw in image.pictures.values():
            draw()

    def corners(entry):
        x, y, w, h = entry["bbox"]
        return [x, y, x + w, y + h]

    sizes, boxes, classes, masks, names = zip(*shown, strict=True)
    assert set(sizes) == {(96, 128, 3)} and names == (["block", "bar"],) * 4
    assert boxes[0] == boxes[1] == [corners(bar), corners(block)] and boxes[3] == []
    assert classes == ([1, 0], [1, 0], [1, 0], []) and masks[1] is masks[3] is None
    assert capsys.readouterr().out == ""
    assert len(run(detections, 1, [coco_files.json("val")]).images) <= 1


def test_masks_are_judged_where_there_are_some(coco_files, run, monkeypatch):
    entries = [*truth_of(coco_files, 0), *truth_of(coco_files, 1)]
    detections = []
    for entry in entries:
        mask = np.zeros((96, 128), np.uint8, order="F")
        x, y, w, h = entry["bbox"]
        # The boxes are right; of the second photo's masks a third is there.
        mask[y : y + h, x : x + (w if entry["image_id"] == 0 else w // 3)] = 1
        packed = coco_masks.encode(mask)
        segmentation = {"size": [96, 128], "counts": packed["counts"].decode()}
        detections.append(found_as(entry, 0.75, segmentation=segmentation))
    verdict = run(detections)
    assert [image.score for image in verdict.images] == pytest.approx([100, 0])
    assert verdict.measure == "mask AP50 on the image alone"
    shown = drawn_boxes(monkeypatch)
    for image in verdict.images:
        image.pictures["prediction"]()
    assert [found[3] for found in shown] == [[1200, 1200], [20 * 20, 10 * 40]]


def test_nothing_was_found(coco_files, run, monkeypatch):
    # Nor is there anything in a third photo.
    more = {"id": 7, "file_name": "1.png", "height": 96, "width": 128}
    coco_files.edit("val", lambda content: content["images"].append(more))
    verdict = run([])
    assert [image.score for image in verdict.images] == [0.0, 0.0]
    assert verdict.measure == "box AP50 on the image alone"
    shown = drawn_boxes(monkeypatch)
    verdict.images[0].pictures["prediction"]()
    assert shown[0][1:4] == ([], [], None)


def test_a_config_as_its_yaml_has_it(tmp_path, monkeypatch):
    (tmp_path / "config.yaml").write_text("a: {b: [1, 2]}")
    assert reporting.config_values(tmp_path / "config.yaml") == {"a": {"b": [1, 2]}}
    monkeypatch.setattr(reporting, "load_config", lambda path: OmegaConf.create({"from": path}))
    assert reporting.config_values(tmp_path / "a.py") == {"from": str(tmp_path / "a.py")}


# The page of the data


def entry(tmp_path, name, *objects):
    """A dataset dict: a photo of 64x48 pixels and its objects."""
    Image.new("RGB", (64, 48), (9, 9, 9)).save(tmp_path / name)
    annotations = [
        dict(category_id=c, bbox=box, bbox_mode=BoxMode.XYWH_ABS, iscrowd=int(crowd))
        for c, box, crowd in objects
    ]
    return {"file_name": str(tmp_path / name), "image_id": name, "annotations": annotations}


def test_objects_are_counted_by_class_and_size(tmp_path):
    def square(side, kind=0, crowd=False):
        return kind, [3, 5, side, side], crowd

    dicts = [
        entry(
            tmp_path,
            "a.png",
            square(31.9),
            square(32),
            square(95.9, 2),
            square(96),
            square(7, 2, True),
        ),
        entry(tmp_path, "b.png", square(200, 2), (2, [1, 2, -5, 4], False)),
        entry(tmp_path, "c.png", square(50, 1, True)),
        {"file_name": str(tmp_path / "a.png")},
    ]
    split = browsing._split("training", dicts, ["cat", "dog", "bird"], 2, 5)
    assert (split.name, split.total) == ("training", 4)
    assert split.facts == {
        **{"photos": 4, "objects": 6, "objects a photo": 1.5, "classes": 3},
        **{"crowds, not trained on": 2, "photos without objects": 2},
        **{"small objects (below 32x32)": 2, "medium objects": 2},
        "large objects (96x96 and more)": 2,
    }
    assert split.frequencies == page.Table(
        ["class", "objects", "photos"],
        [
            ["cat", page.Cell(3, share=1.0), 1],
            ["dog", page.Cell(0, share=0.0), 0],
            ["bird", page.Cell(3, share=1.0), 2],
        ],
    )
    assert split.odd == ["no training object is of dog"]
    [(name, sides)] = split.histograms.items()
    assert name == "object side (root of the area)"
    assert sides == pytest.approx([31.9, 32, 95.9, 96, 200, 0])
    chosen = [dicts[i]["file_name"] for i in pages_of_data.chosen(4, 2, 5)]
    assert [photo.name for photo in split.photos] == chosen
    # Nothing at all; ten classes are named.
    names = [f"{n}" for n in range(12)]
    split = browsing._split("validation", [], names, 2, 5)
    assert split.facts["objects a photo"] == 0 == split.facts["objects"]
    assert split.odd == [f"no validation object is of {', '.join(names[:10])}"]
    one = entry(tmp_path, "a.png", square(9, 1), square(9, 1), square(9))
    split = browsing._split("training", [one], ["cat", "dog"], 9, 0)
    assert [row[1].share for row in split.frequencies.rows] == [0.5, 1.0] and split.odd == []
    assert split.facts["objects a photo"] == 3


def test_the_truth_of_a_photo(tmp_path):
    polygon = [[1, 2, 11, 2, 11, 22, 1, 22]]
    found = entry(tmp_path, "a.png", (2, [1, 2, 10, 20], False), (0, [5, 5, 9, 9], True))
    image, instances = browsing.truth(found)
    assert image.shape == (48, 64, 3) and not instances.has("gt_masks")
    assert instances.gt_boxes.tensor.tolist() == [[1, 2, 11, 22]]
    assert instances.gt_classes.tolist() == [2]
    assert found["annotations"][0]["bbox"] == [1, 2, 10, 20], "the entry stays as it is"
    found["annotations"][0]["segmentation"] = polygon
    masks = browsing.truth(found)[1].gt_masks
    assert isinstance(masks, BitMasks) and masks.tensor.shape == (1, 48, 64)
    assert int(masks.tensor.sum()) == 200
    # One without a mask: boxes alone.
    found["annotations"].append(dict(found["annotations"][0], segmentation=[]))
    image, instances = browsing.truth(found)
    assert len(instances) == 2 and not instances.has("gt_masks")
    assert len(browsing.truth({"file_name": found["file_name"]})[1]) == 0


@pytest.mark.parametrize("count", [1, 6, 7])
@pytest.mark.parametrize(
    "size, factor", [((48, 64), 1), ((640, 64), 1), ((320, 1280), 0.5), ((1281, 1), 640 / 1281)]
)
def test_a_sample_is_drawn_at_640_pixels(monkeypatch, count, size, factor):
    told = []
    monkeypatch.setattr(drawing, "draw_instances", lambda *a: told.append(a) or a[0])
    height, width = size
    image = np.zeros((*size, 3), np.uint8)
    image[: height // 2] = 200
    boxes = torch.tensor([[0.0, 0.0, width, height / 2]] * count)
    instances = Instances(size, gt_boxes=Boxes(boxes), gt_classes=torch.arange(count) % 2)
    colours = {"cat": (1, 2, 3), "dog": (4, 5, 6)}
    browsing.drawn(image, instances, colours)
    masks = torch.zeros(count, *size, dtype=torch.bool)
    masks[:, : height // 2] = True
    instances.gt_masks = BitMasks(masks)
    browsing.drawn(image, instances, colours)
    (small, scaled, none, texts, chosen), (_, _, bitmaps, _, _) = told
    shape = (round(factor * height), max(1, round(factor * width)))
    assert small.shape == (*shape, 3) and none is None
    assert small[0, 0].tolist() == [200] * 3 and small[-1, -1].tolist() == [0] * 3
    np.testing.assert_allclose(scaled, factor * boxes.numpy())
    names, order = (["cat", "dog"] * 4)[:count], [(1, 2, 3), (4, 5, 6)] * 4
    # Names of more than six would cover each other.
    assert texts == (names if count <= 6 else [""] * count) and chosen == order[:count]
    assert bitmaps.shape == (count, *shape) and bitmaps.dtype == bool
    assert abs(bitmaps.mean() - 0.5) < 0.02 and bitmaps[:, 0].all() and not bitmaps[:, -1].any()
    polygon = [np.array([0.0, 0, width, 0, width, height // 2, 0, height // 2])]
    if width > 1:
        instances.gt_masks = PolygonMasks([polygon] * count)
        browsing.drawn(image, instances, colours)
        assert (told[-1][2] == bitmaps).mean() > 0.98
    browsing.drawn(image, instances[torch.zeros(count, dtype=torch.bool)], colours)
    assert told[-1][2] is None and len(told[-1][1]) == 0


def test_a_sample_is_what_its_mapper_makes(tmp_path, monkeypatch):
    monkeypatch.setattr(browsing, "drawn", lambda image, instances, colours: image.copy())
    found = entry(tmp_path, "a.png", (0, [1, 2, 10, 20], False), (0, [1, 2, 10, 20], False))
    picture = browsing._sample(found, None, {}, None)
    assert picture.caption == picture.alt == "a.png: 64x48, 2 objects"
    pixels = torch.zeros(3, 30, 50, dtype=torch.uint8)
    pixels[0] = 200

    def mapper(given):
        assert given is found
        instances = Instances((30, 50), gt_classes=torch.zeros(1))
        return {"image": pixels, "instances": instances}

    for order, channel in (("RGB", 0), ("BGR", 2)):
        picture = browsing._sample(found, mapper, {}, order)
        assert picture.caption == picture.alt == "a.png: 50x30, 1 object"
        assert picture.image.shape == (30, 50, 3) and picture.image[5, 7, channel] == 200
        assert picture.image.sum() == 30 * 50 * 200
    assert browsing._sample(found, lambda _: None, {}, "RGB") is None

    def unreadable(_):
        raise UnreadableImage

    assert browsing._sample(found, unreadable, {}, "RGB") is None
    found["annotations"].pop()
    assert browsing._sample(found, None, {}, None).caption.endswith("1 object")
    (tmp_path / "a.png").write_text("no photo")
    assert browsing._sample(found, None, {}, None) is None


def test_both_splits_of_a_page(monkeypatch, tmp_path):
    data = {"train_json": str(tmp_path / "train.json"), "train_images": "t"}
    data |= {"val_json": str(tmp_path / "val.json"), "val_images": "v"}
    for name in ("train", "val"):
        (tmp_path / f"{name}.json").write_text(json.dumps({"of": name}))
    loader = lambda name: dict(dataset=name)  # noqa: E731
    loaders = dict(
        train=dict(dataset="train", mapper=dict(image_format="BGR")), test=loader("test")
    )
    loaders |= dict(evaluator="x", metadata=dict(classes=["cat", "dog"]))
    cfg = OmegaConf.create(dict(dataloader=loaders, data=data))
    mapper = SimpleNamespace(image_format="BGR")
    sets = {"train": [{"n": n} for n in range(20)], "test": [{"n": n} for n in range(10)]}
    resolved, sampled, checked = [], [], []

    def sample(given, mapped, colours, order):
        sampled.append((given["n"], mapped, order, float(torch.rand(()))))
        return None if given["n"] == sampled[0][0] else f"picture of {given['n']}"

    def faults(content, folder):
        checked.append((content, folder))
        return [browsing.annotations.Fault("image", 0, "image 1", "no")]

    def resolve(given, training):
        resolved.append((given.data.get("allow_invalid"), training))

    monkeypatch.setattr(browsing, "resolve_data", resolve)
    monkeypatch.setattr(
        browsing, "instantiate", lambda n: sets[n] if isinstance(n, str) else mapper
    )
    monkeypatch.setattr(
        browsing, "_split", lambda name, *a: pages_of_data.Split(name, {"given": a})
    )
    monkeypatch.setattr(browsing, "_sample", sample)
    monkeypatch.setattr(browsing.annotations, "faults", faults)
    (training, validation), colours = browsing.splits(cfg, 7, 5, 3)
    assert resolved == [(True, True)]
    assert colours == dict(zip(("cat", "dog"), drawing.class_colours(2), strict=True))
    for split, name in ((training, "train"), (validation, "test")):
        assert split.facts["given"] == (sets[name], ["cat", "dog"], 5, 3)
        assert split.odd == ["image 1: no"]
    assert (training.name, validation.name) == ("training", "validation")
    assert checked == [({"of": "train"}, "t"), ({"of": "val"}, "v")]
    wanted = [pages_of_data.chosen(20, 7, 3), pages_of_data.chosen(10, 3, 3)]
    assert [n for n, *_ in sampled] == wanted[0] + wanted[1]
    assert [given[1:3] for given in sampled] == [(mapper, "BGR")] * 7 + [(None, None)] * 3
    # Each is drawn by a seed of its own, wherever it stands.
    drawn = {}
    for n, *_, number in sampled:
        torch.manual_seed(3 + n)
        drawn[n] = number == float(torch.rand(()))
    assert all(drawn.values())
    missing = sampled[0][0]
    assert training.samples == [f"picture of {n}" for n in wanted[0] if n != missing]
    assert training.about_samples == (
        "Drawn at random, with the config's augmentation: cropped, flipped and resized as training "
        "gets them. Boxes and masks are those that the losses see."
    )
    assert validation.about_samples == (
        "Drawn at random, not augmented, with all annotated objects but crowds."
    )
    # Registered data, without an evaluation.
    del cfg.dataloader.evaluator
    cfg.data = None
    [training], _ = browsing.splits(cfg, 7, 5, 3)
    assert training.name == "training" and training.odd == [] and len(checked) == 2
