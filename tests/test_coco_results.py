"""COCO's results file of predictions, evaluated by pycocotools."""

import json

import numpy as np
import pytest
from PIL import Image

from dense import prediction
from dense.coco import CocoIds, write_results
from dense.prediction import PredictionError, plan
from tests.support import load_tool

pytest.importorskip("pycocotools")

BOXES = {"one": (4, 6, 30, 20), "two": (10, 8, 24, 22)}
IDS, CATEGORIES = {"one": 71, "two": 9}, {"cat": 3, "dog": 17}


@pytest.fixture
def annotated(tmp_path):
    """Two images in a folder each, a dog in each, and their annotations."""
    annotations = []
    for number, (name, (x, y, w, h)) in enumerate(BOXES.items(), 1):
        (tmp_path / "photos" / name).mkdir(parents=True)
        Image.new("RGB", (60, 40), (x, y, 0)).save(tmp_path / f"photos/{name}/a.png")
        polygon = [x, y, x + w, y, x + w, y + h, x, y + h]
        annotations.append(
            dict(id=number, image_id=IDS[name], category_id=17, bbox=[x, y, w, h], area=w * h)
            | dict(iscrowd=0, segmentation=[polygon])
        )
    images = [
        dict(id=number, file_name=f"{name}/a.png", width=60, height=40)
        for name, number in IDS.items()
    ]
    categories = [dict(id=number, name=name) for name, number in CATEGORIES.items()]
    content = dict(images=images, annotations=annotations, categories=categories)
    path = tmp_path / "annotations.json"
    path.write_text(json.dumps(content))
    return path


def perfect_detector(image):
    x, y, _ = image[0, 0].tolist()
    [box] = [box for box in BOXES.values() if box[:2] == (x, y)]
    mask = np.zeros((1, 40, 60), bool)
    mask[0, y : y + box[3], x : x + box[2]] = True
    return {
        "boxes": np.array([[x, y, x + box[2], y + box[3]]], np.float32),
        "scores": np.array([0.9], np.float32),
        "classes": np.array([1]),
        "masks": mask,
        "class_names": ["cat", "dog"],
    }


@pytest.fixture
def tool(monkeypatch):
    """``tools/predict.py`` with a detector that finds all objects."""
    module = load_tool("predict")
    monkeypatch.setattr(module.recipes, "framework_of", lambda config: "detection")

    def load(args, framework, config, ids):
        draw = lambda image, *_: image  # noqa: E731
        image_id = ids and ids.image
        return prediction.detection_writer(perfect_detector, 0.5, draw, image_id=image_id)

    monkeypatch.setattr(module, "load", load)
    return module


@pytest.mark.parametrize("kind", ["bbox", "segm"])
def test_pycocotools_finds_every_object(annotated, tool, tmp_path, capsys, kind):
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    out = tmp_path / "out"
    words = [str(tmp_path / "photos"), "--checkpoint", "x.pth", "--config", "x.py"]
    words += ["--out", str(out)]
    # The first run knows no ids; the second adds them to the results that are there.
    assert tool.main(words) == 0
    assert not (out / "coco_results.json").exists()
    assert "predicting: 100%" in capsys.readouterr().err
    assert tool.main([*words, "--coco", str(annotated), "--resume"]) == 0
    truth = COCO(str(annotated))
    evaluation = COCOeval(truth, truth.loadRes(str(out / "coco_results.json")), kind)
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    assert evaluation.stats[0] == pytest.approx(1.0)

    assert tool.main([*words, "--coco", str(annotated), "--overwrite"]) == 0
    found = [json.loads(path.read_text()) for path in sorted(out.rglob("a.json"))]
    assert [content["image_id"] for content in found] == [71, 9]


def test_what_the_annotations_lack_is_said_before_any_prediction(annotated, tool, tmp_path, capsys):
    other = tmp_path / "other.png"
    Image.new("RGB", (8, 8)).save(other)
    words = [str(other), "--checkpoint", "x.pth", "--config", "x.py", "--out", str(tmp_path / "o")]
    assert tool.main([*words, "--coco", str(annotated)]) == 2
    assert f"--coco {annotated} lists no image {other}" in capsys.readouterr().err
    assert tool.main([*words, "--coco", str(tmp_path / "absent.json")]) == 2
    assert "absent.json: No such file" in capsys.readouterr().err
    (tmp_path / "wrong.json").write_text("[]")
    assert tool.main([*words, "--coco", str(tmp_path / "wrong.json")]) == 2
    assert "is not COCO-style" in capsys.readouterr().err


def test_a_class_that_the_annotations_lack(annotated, tmp_path):
    content = json.loads(annotated.read_text())
    content["categories"].pop()
    annotated.write_text(json.dumps(content))
    jobs = plan([tmp_path / "photos"], tmp_path / "out", "detection")
    write = prediction.detection_writer(perfect_detector, 0.5, lambda image, *_: image)
    assert prediction.run(jobs, write) == []
    with pytest.raises(PredictionError, match="has no category 'dog'; it has cat"):
        write_results(tmp_path / "out", CocoIds(annotated))


def test_an_image_is_known_by_as_much_of_its_path_as_the_annotations_have(tmp_path):
    path = tmp_path / "annotations.json"
    names = {"a.png": 1, "deep/a.png": 2, "b/c/d.png": 3, "/abs/e.png": 4}
    content = dict(categories=[dict(id=5, name="cat")])
    content["images"] = [dict(id=number, file_name=name) for name, number in names.items()]
    path.write_text(json.dumps(content))
    ids = CocoIds(path)
    found = {"x/a.png": 1, "a.png": 1, "x/deep/a.png": 2, "x/y/b/c/d.png": 3, "/abs/e.png": 4}
    assert {source: ids.image(source) for source in found} == found
    for absent in ("c/d.png", "x/b/d.png", "other.png"):
        with pytest.raises(PredictionError, match=f"--coco {path} lists no image {absent}$"):
            ids.image(absent)
    assert ids.category("cat") == 5
    for key in ("images", "categories"):
        path.write_text(json.dumps({k: v for k, v in content.items() if k != key}))
        with pytest.raises(PredictionError, match=f"is not COCO-style: KeyError.'{key}'.$"):
            CocoIds(path)


def test_every_field_of_a_result(annotated, tmp_path):
    folder = tmp_path / "out/detections/deep"
    folder.mkdir(parents=True)
    instance = {"class_name": "dog", "class_id": 1, "bbox": [1, 2, 3, 4], "score": 0.5}
    other = {**instance, "segmentation": {"size": [1, 1]}, "class_name": "cat"}
    content = {"image": "photos/one/a.png", "instances": []}
    (folder / "none.json").write_text(json.dumps(content))
    # In the order of their names, whenever they were written.
    for number in (5, 2, 8, 1, 9, 3):
        instance, other = ({**entry, "score": number / 10} for entry in (instance, other))
        content = {"image": "photos/two/a.png", "instances": [instance, other]}
        (folder / f"{number}.json").write_text(json.dumps(content))
    path = write_results(str(tmp_path / "out"), CocoIds(str(annotated)))
    assert path == tmp_path / "out/coco_results.json"
    shared = {"image_id": 9, "bbox": [1, 2, 3, 4]}
    assert json.loads(path.read_text()) == [
        entry
        for number in (1, 2, 3, 5, 8, 9)
        for entry in (
            {**shared, "score": number / 10, "category_id": 17},
            {
                **shared,
                **{"score": number / 10, "category_id": 3, "segmentation": {"size": [1, 1]}},
            },
        )
    ]
