"""tools/predict.py without a network: what is loaded how, on which device, and what it says."""

import json
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
from PIL import Image

from dense import drawing, prediction
from dense.export.files import ExportError
from tests.support import load_tool


@pytest.fixture
def tool():
    return load_tool("predict")


@pytest.fixture
def words(tmp_path):
    """A command line of three photos, the second broken."""
    (tmp_path / "photos").mkdir()
    for name in "abc":
        Image.new("RGB", (60, 40)).save(tmp_path / f"photos/{name}.png")
    (tmp_path / "photos/b.png").write_text("no image")
    (tmp_path / "model.pth").touch()
    return [str(tmp_path / "photos"), "--checkpoint", str(tmp_path / "model.pth")] + [
        *("--config", str(tmp_path / "x.py"), "--out", str(tmp_path / "out"))
    ]


@pytest.fixture
def written(tool, monkeypatch):
    """The arguments of the writers of all kinds, which write nothing but an empty result."""
    found = []

    def writer(kind, *names):
        defaults = dict(zip(("draw", "legend", "image_id"), (None, True, None), strict=True))

        def make(*given, **named):
            values = dict(zip(names, given, strict=False)) | named
            found.append((kind, (defaults | values) if kind == "detection" else values))

            def write(image, job):
                job.result.write_text(json.dumps({"image": str(job.source), "instances": []}))

            return write

        return make

    names = ("predictor", "score_threshold", "draw", "legend", "image_id")
    monkeypatch.setattr(prediction, "detection_writer", writer("detection", *names))
    monkeypatch.setattr(prediction, "classification_writer", writer("classes", "predictor"))
    monkeypatch.setattr(prediction, "segmentation_writer", writer("labels", "predictor", "legend"))
    monkeypatch.setattr(
        prediction, "write_classes", lambda *given: found.append(("write_classes", given))
    )
    return found


MODULES = {
    "detection": "dense.detection",
    "mmdetection": "dense.mmdetection",
    "classification": "dense.pretraining.predictor",
    "segmentation": "dense.segmentation",
}


@pytest.fixture
def networks(tool, monkeypatch):
    """Have a framework's ``load_predictor`` return a stand-in; what each was given."""
    loaded = []
    for framework, name in MODULES.items():
        module = ModuleType(name)

        def load_predictor(config, checkpoint, device, framework=framework):
            loaded.append((framework, config, checkpoint, device))
            return SimpleNamespace(of=framework, classes=("a", "b"), palette=((1, 2, 3), (4, 5, 6)))

        module.load_predictor = load_predictor
        monkeypatch.setitem(sys.modules, name, module)
    return loaded


def coco(tmp_path, *names):
    content = {"images": [{"file_name": n, "id": 7 + i} for i, n in enumerate(names)]}
    path = tmp_path / "annotations.json"
    path.write_text(json.dumps(content | {"categories": []}))
    return path


@pytest.mark.parametrize("legend", [True, False])
@pytest.mark.parametrize("framework", MODULES)
def test_what_is_loaded(
    tool, framework, legend, words, networks, written, tmp_path, monkeypatch, capsys
):
    asked = []
    monkeypatch.setattr(
        tool.recipes, "framework_of", lambda config: asked.append(config) or framework
    )
    detects = "detection" in framework
    more = [] if legend else ["--no-legend"]
    if detects:
        more += ["--coco", str(coco(tmp_path, "a.png", "b.png", "c.png")), "--score-thr", "0.25"]
    assert tool.main([*words, "--device", "cpu", *more]) == 1
    config, checkpoint, out = (str(tmp_path / name) for name in ("x.py", "model.pth", "out"))
    assert networks == [(framework, config, checkpoint, "cpu")] and asked == [config]
    kind, given = written[-1]
    assert given.pop("predictor").of == framework
    if detects:
        image_id = given.pop("image_id")
        assert [image_id(f"photos/{name}.png") for name in "abc"] == [7, 8, 9]
        draw = None if framework == "detection" else drawing.draw_instances_openmmlab
        assert given == {"score_threshold": 0.25, "draw": draw, "legend": legend}
    elif framework == "segmentation":
        assert given == {"legend": legend}
        assert written[0] == ("write_classes", (out, ("a", "b"), ((1, 2, 3), (4, 5, 6))))
    folder = "detections" if detects else {"segmentation": "labels"}.get(framework, "classes")
    assert kind == ("detection" if detects else folder)
    said = capsys.readouterr()
    results = [f"COCO results: {out}/coco_results.json"] if detects else []
    assert said.out.splitlines() == [
        *results,
        f"2 images predicted: {out}/overlays, {folder}",
    ]
    errors = [line for line in said.err.splitlines() if line.startswith("predict: ")]
    assert len(errors) == 2 and "b.png cannot be read as an image" in errors[0]
    assert errors[1] == "predict: 1 of 3 images were unreadable"
    assert "predicting: 100%" in said.err and "3/3" in said.err and "image/s" in said.err


def test_without_annotations_there_are_no_ids(tool, words, networks, written, monkeypatch, capsys):
    monkeypatch.setattr(tool.recipes, "framework_of", lambda config: "detection")
    Image.new("RGB", (9, 9)).save(f"{words[0]}/b.png")
    assert tool.main([*words, "--device", "cpu"]) == 0
    assert written[-1][1]["image_id"] is None and written[-1][1]["score_threshold"] == 0.5
    said = capsys.readouterr()
    assert said.out == f"3 images predicted: {words[-1]}/overlays, detections\n"
    assert "predict: " not in said.err
    # Again: all is there.
    assert tool.main([*words, "--resume"]) == 0
    assert capsys.readouterr().out == f"all results are in {words[-1]} already\n"
    assert len(networks) == 1
    assert tool.main([*words, "--overwrite", "--device", "cpu"]) == 0 and len(networks) == 2


def test_the_config_beside_the_checkpoint(tool, words, networks, written, tmp_path, monkeypatch):
    monkeypatch.setattr(tool.recipes, "framework_of", lambda config: "classification")
    (tmp_path / "own.py").touch()
    place = words.index("--config")
    assert tool.main([*words[:place], *words[place + 2 :], "--device", "cpu"]) == 1
    assert networks[0][1] == str(tmp_path / "own.py")


@pytest.mark.parametrize("framework", ["segmentation", "classification"])
def test_coco_is_for_detectors(tool, framework, words, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(tool.recipes, "framework_of", lambda config: framework)
    path = coco(tmp_path, "a.png", "b.png", "c.png")
    assert tool.main([*words, "--coco", str(path)]) == 2
    assert capsys.readouterr().err == "predict: --coco is for the results of detectors\n"


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (ValueError("two\n  lines"), "{0}/model.pth with {0}/x.py: two lines"),
        (RuntimeError("sizes"), "{0}/model.pth with {0}/x.py: sizes"),
        (OSError("disk"), "{0}/model.pth with {0}/x.py: disk"),
        (ImportError("no framework"), "no framework"),
        (ExportError("no file"), "no file"),
        (prediction.PredictionError("no job"), "no job"),
    ],
)
def test_what_a_framework_raises_is_one_line(
    tool, error, said, words, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(tool.recipes, "framework_of", lambda config: "detection")

    def load(*_):
        raise error

    monkeypatch.setattr(tool, "load", load)
    assert tool.main(words) == 2
    assert capsys.readouterr().err == f"predict: {said.format(tmp_path)}\n"


def test_a_category_that_is_missing_is_said_at_the_end(tool, words, tmp_path, monkeypatch, capsys):
    def write(image, job):
        entry = {"class_name": "dog", "bbox": [], "score": 1}
        job.result.write_text(json.dumps({"image": str(job.source), "instances": [entry]}))

    monkeypatch.setattr(tool.recipes, "framework_of", lambda config: "detection")
    monkeypatch.setattr(tool, "load", lambda *_: write)
    path = coco(tmp_path, "a.png", "b.png", "c.png")
    assert tool.main([*words, "--coco", str(path)]) == 2
    said = capsys.readouterr()
    assert f"predict: --coco {path} has no category 'dog'; it has" in said.err
    assert "images predicted" not in said.out


# Files of export.py


class Exported:
    """A predictor of a file: a segmentor has a palette."""

    def __init__(self, palette=None):
        self.classes = ("a",)
        if palette:
            self.palette = palette


@pytest.mark.parametrize("task", ["detection", "segmentation", "classification"])
def test_a_file_needs_no_config(tool, task, words, written, tmp_path, monkeypatch, capsys):
    from dense.export import predictor

    monkeypatch.setattr(predictor, "Detector", type("Detector", (Exported,), {}))
    made = predictor.Detector() if task == "detection" else Exported(task == "segmentation" and [1])
    loaded = []
    monkeypatch.setattr(predictor, "load_predictor", lambda path: loaded.append(path) or made)
    file = str(tmp_path / "model.onnx")
    args = [words[0], "--checkpoint", file, "--out", words[-1]]
    more = ["--device", "cpu", "--no-legend", "--score-thr", "0.75"]
    if task == "detection":
        more += ["--coco", str(coco(tmp_path, "a.png", "b.png", "c.png"))]
    assert tool.main([*args, *more]) == 1
    assert loaded == [file]
    kind, given = written[-1]
    assert given.pop("predictor") is made
    if task == "detection":
        assert given.pop("image_id")("a.png") == 7
        assert given == {"score_threshold": 0.75, "draw": None, "legend": False}
        assert kind == "detection"
        assert tool.main([*args, "--overwrite"]) == 1
        assert written[-1][1]["legend"] is True and written[-1][1]["image_id"] is None
    elif task == "segmentation":
        assert (kind, given) == ("labels", {"legend": False})
        assert written[0] == ("write_classes", (words[-1], ("a",), [1]))
    else:
        assert (kind, given) == ("classes", {})
    capsys.readouterr()
    for option, value in (("--config", "x.py"), ("--device", "cuda")):
        assert tool.main([*args, option, value]) == 2
        assert capsys.readouterr().err == (
            f"predict: {option} {value}: {file} is an exported file, which runs on the CPU and "
            "holds what it needs\n"
        )


# The device


@pytest.mark.parametrize("count", [0, 1, 2])
def test_the_device(tool, count, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    assert tool.pick_device(None) == ("cuda" if count else "cpu")
    assert tool.pick_device("cpu") == "cpu"
    for name, index in (("cuda", 0), ("cuda:0", 0), ("cuda:1", 1), ("cuda:2", 2)):
        if index < count:
            assert tool.pick_device(name) == name
        else:
            with pytest.raises(prediction.PredictionError, match=f"{name}: there are {count} GPUs"):
                tool.pick_device(name)
    for name in ("meta", "quantum"):
        with pytest.raises(prediction.PredictionError, match=f"{name}: cpu, cuda or cuda:N is"):
            tool.pick_device(name)
