"""Exported detectors: beside Detectron2, mistakes told, predicted from and evaluated."""

import json
from itertools import product

import numpy as np
import pytest
from PIL import Image

from dense.export import files
from tests.export.conftest import exported, make_detector
from tests.support import load_tool, run_without

pytest.importorskip("detectron2", reason="Detectron2 is not installed")
pytest.importorskip("onnxruntime")
pytest.importorskip("openvino")

from dense.export import detections  # noqa: E402
from dense.export.checking import find_photos, normalised  # noqa: E402
from dense.export.detections import Found, compare_detections, differences  # noqa: E402
from dense.export.sources import read_source  # noqa: E402
from dense.prediction import _run_lengths  # noqa: E402

# Rows and columns: odd ones, wide, the smallest.
SIZES = ((97, 131), (160, 213), (65, 400), (32, 32))
# Nothing is found on it.
GREY = np.full((101, 159, 3), 120, np.uint8)


@pytest.fixture(scope="module")
def source(detector):
    return read_source(detector)


@pytest.fixture(scope="module")
def images(photos):
    return find_photos(photos, 3)


def in_eager(source):
    """The function of tensors that is exported, not exported, as a file would be called."""
    import torch

    def run(image: np.ndarray) -> list[np.ndarray]:
        with torch.inference_mode():
            return [out.numpy() for out in source.network(torch.from_numpy(image))]

    return run


def agrees(run, source, images) -> None:
    for image, size in (*product(images, SIZES), (GREY, None)):
        true = detections.eager_detections(source, image, size)
        ours = Found(*run(normalised(image, source.about, size)))
        assert bool(len(true.scores)) == (image is not GREY)
        assert len(ours.scores) == len(true.scores)
        errors, pairs, alone = differences(ours, true)
        assert (pairs, alone) == (len(true.scores), 0)
        assert errors["boxes"] < 1e-3 and errors["scores"] < 1e-4 and errors["masks"] < 1e-4


@pytest.mark.parametrize("shared", [True, False])
def test_the_function_is_detectron2s(shared, source, images, tmp_path):
    """A mask head and a box of all classes, and heads of each stage and boxes of each class."""
    if not shared:
        options = ("model.roi_heads.shared_heads=False",)
        other = read_source(make_detector(tmp_path, *options))
        for image in images:
            errors, pairs, alone = differences(
                Found(*in_eager(other)(normalised(image, other.about, SIZES[0]))),
                detections.eager_detections(other, image, SIZES[0]),
            )
            assert pairs > 5 and not alone and errors["boxes"] < 1e-3 > errors["masks"]
        return
    agrees(in_eager(source), source, images)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["onnx", "openvino"])
def test_a_file_finds_what_detectron2_finds(kind, source, detector_file, images, tmp_path):
    file = detector_file
    if kind == "openvino":
        file = files.to_openvino(file, tmp_path / "file.xml")[0]
    run = files.Runner(file)
    agrees(run, source, images)
    assert (run.about["task"], run.about["classes"]) == ("detection", ["cat", "dog", "bus"])
    assert (run.about["resize"], run.about["batch"]) == ([256, 160], 1)
    with pytest.raises(files.ExportError, match="for one image at a time, not 2"):
        run(np.zeros((2, 3, 64, 64), np.float32))


def unclipped(monkeypatch, source):
    monkeypatch.setattr("dense.export.detector.clipped", lambda boxes, size: boxes)
    return in_eager(source)


def wrong_levels(monkeypatch, source):
    from dense.export import detector

    levels = detector._levels
    monkeypatch.setattr(detector, "_levels", lambda *args: 3 - levels(*args))
    return in_eager(source)


def wrong_channels(monkeypatch, source):
    return lambda image: in_eager(source)(image[:, ::-1].copy())


def without_nms(monkeypatch, source):
    monkeypatch.setattr("dense.export.detector._alone", lambda boxes, scores, _: scores > -1e9)
    return in_eager(source)


@pytest.mark.parametrize("mistake", [unclipped, wrong_levels, wrong_channels, without_nms])
def test_mistakes_are_told(mistake, source, images, monkeypatch):
    monkeypatch.setattr(detections, "sizes_of", lambda source: ((97, 131),))
    assert compare_detections(source, in_eager(source), images[:1], 1).missed() is None
    run = mistake(monkeypatch, source)
    assert compare_detections(source, run, images[:1], 1).missed()


def test_classes_apart_are_hardly_rounded():
    """Pairs that overlap by 0.5, give or take 2e-4, of 80 classes of a large image."""
    from types import SimpleNamespace

    import torch

    from dense.export.detector import _best

    classes, side = 80, 30.0
    corners = torch.rand(classes, 2, generator=torch.Generator().manual_seed(0)) * 1500
    overlaps = 0.5 + 2e-4 * (-1.0) ** torch.arange(classes)
    shift = side * (1 - overlaps) / (1 + overlaps)
    first = torch.cat([corners, corners + side], 1)
    second = first + torch.stack([shift, 0 * shift] * 2, 1)
    scores = torch.cat([0.9 * torch.eye(classes), 0.8 * torch.eye(classes)])
    scores = torch.cat([scores, torch.zeros(2 * classes, 1)], 1)
    boxes = torch.cat([first, second])[:, None]
    given = dict(test_score_thresh=0.1, test_nms_thresh=0.5, test_topk_per_image=1000)
    found = _best(boxes, scores, SimpleNamespace(**given), (1600, 1600))
    assert found[2].bincount().tolist() == [1 if overlap > 0.5 else 2 for overlap in overlaps]


def found(*scores: float, classes=None, shift: float = 0.0, masks=None) -> Found:
    corners = np.arange(len(scores), dtype=np.float32)[:, None] * 10
    boxes = corners + np.float32([0, 0, 5, 5]) + np.float32(shift)
    return Found(boxes, np.float32(scores), np.array(classes or [0] * len(scores)), masks)


def test_matching():
    true = found(0.9, 0.5, 0.2)
    same = {"boxes": 0.0, "scores": 0.0}
    assert differences(true, true) == (same, 2, 0)
    errors, pairs, alone = differences(found(0.9, 0.5, 0.2, shift=0.5), true)
    assert (errors["boxes"], pairs, alone) == (0.5, 2, 0)
    # Rounding moves a score over the threshold: its partner is below.
    errors, pairs, alone = differences(found(0.9, 0.5, 0.30001), found(0.9, 0.5, 0.29999))
    assert pairs == 3 and alone == 0 and errors["scores"] == pytest.approx(2e-5, rel=0.01)
    # One more of the file, one more of eager, another class.
    assert differences(found(0.9, 0.5, 0.4), found(0.9, 0.5))[1:] == (2, 1)
    assert differences(found(0.9), found(0.9, 0.5))[1:] == (1, 1)
    assert differences(found(0.9, classes=[1]), found(0.9))[1:] == (0, 2)
    # Nothing above the score: the best; nothing at all.
    assert differences(*[found(*np.linspace(0.29, 0.1, 15))] * 2)[1:] == (10, 0)
    assert differences(found(), found())[1:] == (0, 0)
    with pytest.raises(files.ExportError, match="one of the file and eager has masks"):
        differences(found(0.9, masks=np.zeros((1, 28, 28))), found(0.9))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({}, None),
        ({"pairs": 0}, "nothing is found on these photos"),
        ({"alone": 2}, "2 detections are of the file or of eager alone"),
        ({"errors": {"boxes": 0.2}}, "the largest error of boxes is 2.0e-01, 0.1 pixels is"),
        ({"errors": {"masks": float("nan")}}, "the largest error of masks is nan, 0.001 is"),
    ],
)
def test_bars(change, said):
    given = dict(sizes=((8, 9),), pairs=3, below=0, alone=0, errors={"boxes": 0.05}, latency=(1, 2))
    missed = detections.DetectionComparison(**given | change).missed()
    assert missed is None if said is None else said in missed


@pytest.mark.slow
def test_predictions_are_the_checkpoints(detector, detector_file, photos, tmp_path):
    """Also of a photo that is resized before and after."""
    mask = pytest.importorskip("pycocotools.mask")
    predict = load_tool("predict")
    Image.open(photos / "0.png").resize((500, 301)).save(tmp_path / "large.png")
    results = []
    for number, given in enumerate((detector, detector_file)):
        out = tmp_path / str(number)
        words = [str(photos), str(tmp_path / "large.png"), "--out", str(out)]
        words += ["--device", "cpu", "--checkpoint", str(given)]
        assert predict.main(words) == 0
        results.append({p.stem: json.loads(p.read_text()) for p in out.glob("detections/*.json")})
        assert len(list(out.glob("overlays/*.jpg"))) == 4

    assert results[0].keys() == results[1].keys()
    for name, true in results[0].items():
        ours = results[1][name]
        assert [i["class_name"] for i in ours["instances"]] == [
            i["class_name"] for i in true["instances"]
        ]
        for one, other in zip(ours["instances"], true["instances"], strict=True):
            assert one["score"] == pytest.approx(other["score"], abs=1e-4)
            assert one["bbox"] == pytest.approx(other["bbox"], abs=0.02)
            overlap = mask.iou([one["segmentation"]], [other["segmentation"]], [0])
            assert overlap > 0.99 or not mask.area(other["segmentation"])
        assert len(true["instances"]) > 5


def test_a_prediction_of_nothing(source):
    from dense.export.predictor import Detector

    shapes = (0, 4), (0,), (0,), (0, 28, 28)
    kinds = np.float32, np.float32, np.int64, np.float32

    def run(image: np.ndarray) -> list[np.ndarray]:
        assert image.shape == (1, 3, 160, 252)
        return [np.zeros(shape, kind) for shape, kind in zip(shapes, kinds, strict=True)]

    run.about = source.about
    found = Detector(run)(GREY)
    assert found["boxes"].shape == (0, 4) and found["masks"].shape == (0, *GREY.shape[:2])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--to", "torch-export"], "detectors are written in float32 as onnx or openvino"),
        (["--to", "onnx", "--int8"], "detectors are written in float32 as onnx or openvino"),
    ],
)
def test_refused_in_one_line(words, message, detector, photos, capsys):
    args = [str(detector.parent), "--photos", str(photos), *words]
    assert load_tool("export").main(args) == 2
    assert capsys.readouterr().err.splitlines()[-1] == f"export: {message}"


def test_the_random_detector_that_files_are_compared_with(detector):
    """Boxes move, scores differ and masks do: by weights larger than a training begins with."""
    import torch

    content = torch.load(detector, weights_only=True)
    assert content["classes"] == ["cat", "dog", "bus"]
    heads = content["model"]
    scales = {"cls_score": 1.0, "bbox_pred": 0.1, "anchor_deltas": 0.1, "objectness_logits": 0.1}
    scales |= {"mask_head": 0.1}
    for part, scale in scales.items():
        weights = [w for name, w in heads.items() if part in name and name.endswith(".weight")]
        assert weights and all(w.std() == pytest.approx(scale, rel=0.3) for w in weights), part
        biases = [w for name, w in heads.items() if part in name and name.endswith(".bias")]
        assert all((w == 0).all() for w in biases)


def test_other_detectors_are_refused(detector, monkeypatch):
    from detectron2.modeling.roi_heads import CascadeROIHeads

    from dense.detection import predictor

    model, *others = predictor.load_model(None, str(detector))
    model.roi_heads.__class__ = CascadeROIHeads
    monkeypatch.setattr(predictor, "load_model", lambda *_: (model, *others))
    with pytest.raises(files.ExportError, match="of detectors, Cascade R-CNNs of our recipes"):
        read_source(detector)


@pytest.mark.e2e
def test_the_backbone_of_a_detector(detector, source, photos, tmp_path):
    import torch

    file = exported(detector, photos, tmp_path, "onnx", "--part", "backbone")
    x = np.random.default_rng(0).standard_normal((1, 3, 70, 90), np.float32)
    with torch.no_grad():
        expected = source.network.model.backbone.bottom_up(torch.from_numpy(x)).values()
    for ours, true in zip(files.Runner(file)(x), expected, strict=True):
        np.testing.assert_allclose(ours, true, atol=1e-4 * float(true.abs().max()))


@pytest.mark.slow
def test_other_parts_need_no_detectron2():
    names = ("checking", "files", "graphs", "numbers", "predictor", "sources")
    code = "".join(f"import dense.export.{name}\n" for name in names)
    done = run_without(("detectron2", "mmseg"), code)
    assert done.returncode == 0, done.stderr


def annotations(predict, images) -> list[dict]:
    """What a predictor finds, as COCO's results, which can be annotations too."""
    entries = []
    for number, image in enumerate(images):
        found = predict(image)
        for box, score, kind, mask in zip(
            *(found[key] for key in ("boxes", "scores", "classes", "masks")), strict=True
        ):
            x1, y1, x2, y2 = box.tolist()
            bbox = [x1, y1, x2 - x1, y2 - y1]
            run_lengths = _run_lengths(mask)
            about = {"image_id": number, "category_id": int(kind), "score": float(score)}
            about |= {"id": len(entries) + 1, "bbox": bbox, "segmentation": run_lengths}
            entries.append(about | {"iscrowd": 0, "area": bbox[2] * bbox[3]})
    return entries


def precisions(truth: list[dict], results: list[dict], images) -> list[float]:
    """Box and mask AP, in percent, by pycocotools."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    ground = COCO()
    ground.dataset = {
        "images": [{"id": n, "height": len(i), "width": len(i[0])} for n, i in enumerate(images)],
        "categories": [{"id": kind} for kind in range(3)],
        "annotations": truth,
    }
    ground.createIndex()
    scores = []
    for kind in ("bbox", "segm"):
        evaluation = COCOeval(ground, ground.loadRes(results), kind)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
        scores.append(100 * float(evaluation.stats[0]))
    return scores


@pytest.mark.e2e
def test_average_precision_through_files(detector, detector_file, sample_data, tmp_path):
    """Of photos, every second one of eager's detections being the truth: eager's AP to 0.1."""
    pytest.importorskip("pycocotools")
    from dense.detection import load_predictor
    from dense.export import predictor

    photos = find_photos(sample_data / "coco/val2017", 12)
    eager = annotations(load_predictor(None, str(detector)), photos)
    truth = eager[::2]
    expected = precisions(truth, eager, photos)
    assert all(10 < value < 99 for value in expected), expected
    openvino = files.to_openvino(detector_file, tmp_path / "file.xml")[0]
    for file in (detector_file, openvino):
        ours = annotations(predictor.load_predictor(file), photos)
        assert precisions(truth, ours, photos) == pytest.approx(expected, abs=0.1)
