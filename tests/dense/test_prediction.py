"""What a prediction takes for photos, and every field of what it writes."""

import io
import json

import numpy as np
import pytest
from PIL import Image

from dense import drawing, prediction
from dense.prediction import PredictionError, plan
from tests.test_predict import COLOURS, FakeSegmentor, fake_detector, write_photos


@pytest.fixture
def quadrants():
    """A 40x60 image of four flat colours."""
    image = np.zeros((40, 60, 3), np.uint8)
    image[:20, :30], image[:20, 30:], image[20:, :30], image[20:, 30:] = COLOURS
    return image


def test_what_counts_as_a_photo(tmp_path, quadrants):
    photos = tmp_path / "photos"
    (photos / "labels").mkdir(parents=True)
    (photos / "folder.jpg").mkdir()
    kept = {
        "a.JPG",
        "b.jpeg",
        "c.Png",
        "d.bmp",
        "e.webp",
        "f.tif",
        "g.TIFF",
        "h.gif",
        "labels/i.png",
    }
    for name in (*kept, "j.txt", "k.npy", "png"):
        (photos / name).touch()
    jobs = plan([photos], str(tmp_path / "out"), "mmdetection")
    assert {str(job.source.relative_to(photos)) for job in jobs} == kept
    assert [job.source for job in jobs] == sorted(job.source for job in jobs)
    places = {
        str(job.source.relative_to(photos)): [
            str(path.relative_to(tmp_path / "out")) for path in (job.overlay, job.result)
        ]
        for job in jobs
    }
    assert places["labels/i.png"] == ["overlays/labels/i.jpg", "detections/labels/i.json"]
    # A file that is named is taken, whatever it is called; three of one stem are told apart.
    for name in ("x.one", "x.two.three", "x.two"):
        (tmp_path / name).touch()
    named = [tmp_path / name for name in ("x.one", "x.two.three", "x.two")]
    jobs = plan([str(path) for path in named], tmp_path / "out", "segmentation")
    assert [job.result.name for job in jobs] == ["x_one.png", "x.two.png", "x_two.png"]
    (tmp_path / "file").touch()
    with pytest.raises(
        PredictionError, match=f"--out {tmp_path}/file is a file; a folder is needed"
    ):
        plan(named, tmp_path / "file", "segmentation")


def test_all_results_that_are_there_are_counted(tmp_path, quadrants):
    photos = write_photos(tmp_path / "photos", quadrants)
    jobs = plan([photos], tmp_path / "out", "detection")
    for job in jobs:
        job.result.parent.mkdir(parents=True, exist_ok=True)
        job.result.touch()
    with pytest.raises(PredictionError) as refused:
        plan([photos], tmp_path / "out", "detection")
    assert str(refused.value) == (
        f"{tmp_path}/out/detections/a.json is there already (2 results in all); --resume keeps "
        "them and does the rest, --overwrite does them again"
    )
    assert plan([photos], tmp_path / "out", "detection", resume=True) == []
    assert plan([photos], tmp_path / "out", "detection", resume=True, overwrite=True) == jobs


def test_every_entry_of_a_detectors_result(tmp_path, quadrants):
    pytest.importorskip("pycocotools")
    photos = write_photos(tmp_path / "photos", quadrants)
    jobs = plan([photos / "a.png"], tmp_path / "out", "detection")
    drawn = []

    def detector(image):
        found = fake_detector(image)
        found["scores"] = np.array([0.912345678, 0.5, 0.4999], np.float32)
        found["boxes"][1] = (30.126, 20.5, 60.25, 40)
        return found if drawn else {**found, "masks": None}

    def draw(image, boxes, masks, texts, colours):
        drawn.append((boxes.tolist(), masks, texts, colours))
        return image

    for image_id in (None, lambda source: {photos / "a.png": 7}[source]):
        write = prediction.detection_writer(detector, 0.5, draw, image_id=image_id)
        assert prediction.run(jobs, write) == []
        content = json.loads(jobs[0].result.read_text())
        size = {"height": 40, "width": 60, "classes": ["cat", "dog"]}
        boxes = [[5, 2, 20, 10], [30.13, 20.5, 30.12, 19.5]]
        masks = [instance.pop("segmentation", None) for instance in content["instances"]]
        assert content == {
            **{"image": str(photos / "a.png"), **({"image_id": 7} if image_id else {}), **size},
            "instances": [
                {"class_id": 1, "class_name": "dog", "score": 0.91235, "bbox": boxes[0]},
                {"class_id": 0, "class_name": "cat", "score": 0.5, "bbox": boxes[1]},
            ],
        }
        assert [bool(mask) for mask in masks] == [bool(image_id)] * 2
        assert jobs[0].result.read_text().startswith('{\n "image": ')
    cat, dog = drawing.class_colours(2)
    assert [texts for _, _, texts, _ in drawn] == [["dog 91%", "cat 50%"]] * 2
    assert drawn[0][1] is None and drawn[1][1].shape == (2, 40, 60)
    assert [colours for *_, colours in drawn] == [[dog, cat]] * 2
    # A JPEG of a quality at which colours are not mixed up.
    with Image.open(jobs[0].overlay) as overlay:
        assert overlay.format == "JPEG"
        found = np.asarray(overlay).astype(int)[:40]
    assert np.abs(found[[5, 5, 35, 35], [5, 55, 5, 55]] - np.array(COLOURS)).max() < 8
    reference = io.BytesIO()
    Image.new("RGB", (8, 8)).save(reference, "JPEG", quality=92)
    with Image.open(jobs[0].overlay) as overlay, Image.open(reference) as expected:
        assert overlay.quantization == expected.quantization


def test_the_five_best_classes_are_written(tmp_path, quadrants, monkeypatch):
    class Classifier:
        classes = [f"class {i}" for i in range(7)]

        def __call__(self, image):
            assert image.shape == (40, 60, 3)
            return np.array([0.01, 0.4, 0.07, 0.123456, 0.02, 0.3, 0.08], np.float32)

    lines = []
    monkeypatch.setattr(drawing, "draw_lines", lambda image, text: lines.extend(text) or image)
    photos = write_photos(tmp_path / "photos", quadrants)
    jobs = plan([photos], tmp_path / "out", "classification")
    assert [str(job.result.relative_to(tmp_path / "out")) for job in jobs] == [
        *("classes/a.json", "classes/inside/grey.json"),
    ]
    assert prediction.run(jobs[:1], prediction.classification_writer(Classifier())) == []
    order = [(1, 0.4), (5, 0.3), (3, 0.12346), (6, 0.08), (2, 0.07)]
    assert json.loads(jobs[0].result.read_text()) == {
        "image": str(photos / "a.png"),
        "classes": [
            {"class_id": i, "class_name": f"class {i}", "score": score} for i, score in order
        ],
    }
    assert jobs[0].result.read_text().startswith('{\n "image": ') and jobs[0].overlay.is_file()
    assert lines == [f"class {i} {round(100 * score)}%" for i, score in order]


def test_the_classes_of_label_maps(tmp_path):
    for classes in (["sky"], ["sky", "road"]):
        prediction.write_classes(tmp_path / "out", classes, [(1, 2, 3), (4, 5, 6)][: len(classes)])
    path = tmp_path / "out/labels/classes.json"
    assert json.loads(path.read_text()) == [
        {"index": 0, "name": "sky", "colour": [1, 2, 3]},
        {"index": 1, "name": "road", "colour": [4, 5, 6]},
    ]
    assert path.read_text().startswith('[\n {\n  "index": 0')
    with pytest.raises(ValueError):
        prediction.write_classes(tmp_path / "out", ["sky"], [])


def test_an_image_that_fails_is_named_and_the_others_go_on(tmp_path, quadrants):
    photos = write_photos(tmp_path / "photos", quadrants)
    (photos / "cut.png").write_bytes((photos / "a.png").read_bytes()[:60])
    Image.fromarray(quadrants).save(photos / "b.png")
    Image.fromarray(quadrants[:, :9]).save(photos / "c.png")
    jobs, seen = plan([photos], tmp_path / "out", "detection"), []

    def predict(image, job):
        assert job.overlay.parent.is_dir() and job.result.parent.is_dir()
        seen.append(job.source.name)
        if job.source.name == "b.png":
            raise RuntimeError("  no\nsecond line")
        if job.source.name == "c.png":
            raise KeyError

    failed = [str(error) for error in prediction.run(jobs, predict)]
    assert seen == ["a.png", "b.png", "c.png", "grey.jpg"]
    assert failed[:2] == [
        f"{photos / 'b.png'} (60x40) cannot be predicted: no",
        f"{photos / 'c.png'} (9x40) cannot be predicted: KeyError",
    ]
    assert len(failed) == 3 and failed[2].startswith(f"{photos / 'cut.png'} cannot be read as an")


def test_a_label_without_a_class_is_kept_and_not_named(tmp_path, quadrants, monkeypatch):
    pytest.importorskip("mmengine")

    class More(FakeSegmentor):
        def __call__(self, image):
            return [[3, 4, 0], [255, 3, 4]]

    legends = []
    monkeypatch.setattr(drawing, "segmentation_drawer", lambda *_: lambda image, labels: image)
    monkeypatch.setattr(drawing, "with_legend", lambda image, shown: legends.append(shown) or image)
    photos = write_photos(tmp_path / "photos", quadrants)
    jobs = plan([photos / "a.png"], tmp_path / "out", "segmentation")
    for legend in (True, False):
        assert prediction.run(jobs, prediction.segmentation_writer(More(4), legend)) == []
    assert legends == [{"class 0": (0, 3, 7), "class 3": (3, 3, 7)}, {}]
    with Image.open(jobs[0].result) as labels:
        assert np.asarray(labels).tolist() == [[3, 4, 0], [255, 3, 4]]
