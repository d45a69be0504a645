"""Pictures of predictions: colours of classes, legends, and the tool's options for them."""

import sys
from inspect import signature
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from dense import drawing, prediction
from dense.prediction import plan
from tests.support import load_tool
from tests.test_predict import FakeSegmentor, fake_detector, write_photos


@pytest.fixture
def picture():
    image = np.full((40, 60, 3), (10, 10, 250), np.uint8)
    image[:, :30] = (250, 10, 10)
    return image


def test_the_legend_names_the_colours_below_the_overlay(tmp_path, picture):
    pytest.importorskip("mmseg")
    segmentor = FakeSegmentor(4)
    segmentor.palette = [(250, 0, 0), (0, 250, 0), (0, 0, 250), (250, 250, 0)]
    photos = write_photos(tmp_path / "photos", picture)
    pictures = {}
    for legend in (True, False):
        jobs = plan([photos / "a.png"], tmp_path / str(legend), "segmentation")
        prediction.run(jobs, prediction.segmentation_writer(segmentor, legend))
        with Image.open(jobs[0].overlay) as overlay:
            pictures[legend] = np.asarray(overlay).astype(int)
    height, width = pictures[False].shape[:2]
    assert pictures[True].shape[0] > height and pictures[True].shape[1] == width
    np.testing.assert_allclose(
        pictures[True][: height - 16], pictures[False][: height - 16], atol=8
    )
    strip = pictures[True][height:].reshape(-1, 3)
    for colour in segmentor.palette:
        assert (np.abs(strip - colour).max(axis=1) < 60).sum() > 50


def test_a_legend_wraps_and_says_how_many_it_leaves_out(picture):
    few = {f"class {i}": (i, 0, 0) for i in range(3)}
    many = {f"class {i}": (i, 0, 0) for i in range(200)}
    assert drawing.with_legend(picture, {}) is picture
    low, high = (drawing.with_legend(picture, colours) for colours in (few, many))
    assert picture.shape[0] < low.shape[0] < high.shape[0]
    first = drawing.with_legend(picture, dict(list(many.items())[:41]))
    assert first.shape == high.shape, "40 names, and a line for the rest"
    wide = np.full((40, 400, 3), 9, np.uint8)
    strip = drawing.with_legend(wide, {"first": (200, 0, 0), "second": (0, 0, 200)})[40:]
    reds, blues = (np.nonzero((strip == colour).all(2))[1] for colour in ((200, 0, 0), (0, 0, 200)))
    assert len(reds) and len(blues) and reds.max() < blues.min()


def test_legends_have_the_classes_of_their_overlay(tmp_path, picture, monkeypatch):
    pytest.importorskip("mmengine")
    legends, drawn = [], []
    monkeypatch.setattr(
        drawing, "with_legend", lambda image, colours: legends.append(dict(colours)) or image
    )

    def detector(image):
        names = {"classes": np.array([2, 0, 2]), "class_names": ["cat", "bird", "dog"]}
        return {**fake_detector(image), **names}

    def draw(image, boxes, masks, texts, colours):
        drawn.append((texts, colours))
        return image

    class Few(FakeSegmentor):
        def __call__(self, image):
            return np.where(image[..., 0] > 100, 3, 1)

    segmentor = Few(4)
    photos = write_photos(tmp_path / "photos", picture)
    for legend in (True, False):
        for writer in (
            prediction.detection_writer(detector, 0.5, draw, legend),
            prediction.segmentation_writer(segmentor, legend),
        ):
            jobs = plan([photos / "a.png"], tmp_path / "out", "detection", overwrite=True)
            assert prediction.run(jobs, writer) == []
    cat, _, dog = drawing.class_colours(3)
    assert drawn == [(["dog 90%", "cat 60%"], [dog, cat])] * 2
    few = {"class 1": (1, 3, 7), "class 3": (3, 3, 7)}
    assert legends == [{"cat": cat, "dog": dog}, few, {}, {}]


@pytest.mark.parametrize("framework", ["detection", "mmdetection", "segmentation"])
def test_the_tools_options_reach_the_writers(monkeypatch, tmp_path, framework):
    kind = "segmentation" if framework == "segmentation" else "detection"
    parameters, given = signature(getattr(prediction, f"{kind}_writer")), []
    monkeypatch.setattr(
        prediction,
        f"{kind}_writer",
        lambda *a, **k: given.append(parameters.bind(*a, **k).arguments),
    )
    module = SimpleNamespace(load_predictor=lambda *_: SimpleNamespace(classes=(), palette=()))
    monkeypatch.setitem(sys.modules, f"dense.{framework}", module)
    tool = load_tool("predict")
    words = ["a.png", "--checkpoint", "net.pth", "--out", str(tmp_path), "--device", "cpu"]
    args = tool.parse_args([*words, "--no-legend", "--score-thr", "0.3"])
    tool.load(args, framework, "config.py", SimpleNamespace(image="ids"))
    [options] = given
    assert options["legend"] is False
    if kind == "detection":
        assert (options["score_threshold"], options["image_id"]) == (0.3, "ids")


def test_classes_have_colours_of_their_own():
    colours = drawing.class_colours(80)
    assert len(set(colours)) == 80 and colours[:5] == drawing.class_colours(5)
    near = [np.abs(np.subtract(a, b)).max() for a, b in zip(colours, colours[1:], strict=False)]
    assert min(near) > 60


def test_detections_are_drawn_in_the_colours_of_their_classes(tmp_path, picture):
    pytest.importorskip("detectron2")
    boxes = np.array([[2, 2, 20, 16], [30, 20, 56, 38]], np.float32)
    masks = np.zeros((2, 40, 60), bool)
    masks[0, 2:16, 2:20] = masks[1, 20:38, 30:56] = True
    for draw in (drawing.draw_instances, drawing.draw_instances_openmmlab):
        grey = np.full_like(picture, 128)
        drawn = draw(grey, boxes, masks, ["", ""], [(255, 0, 0), (0, 0, 255)])
        scale = drawn.shape[0] // 40
        first, second = (drawn[scale * y, scale * x].astype(int) for x, y in ((10, 10), (44, 30)))
        assert first[0] > 150 > 110 > first[2] and second[2] > 150 > 110 > second[0]
