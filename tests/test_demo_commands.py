"""The demo's commands to the word, its progress, and all that goes onto its page."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dense import report, steps
from dense.demo import scenes
from tests.support import ROOT, load_tool
from tests.test_demo import recorded as recorded
from tests.test_demo import run_recorded, write_lines

CLASSES = "background,disc,box,triangle"
STEPS = {
    "scenes": ("generate scenes", 0, "tools/make_scenes.py OUT/scenes"),
    "train_detector": (
        "train Cascade Mask R-CNN on i_d_dw_conv_nano",
        560,
        "tools/train_detector.py"
        " --config-file configs/detection/cascade_mask_rcnn_i_d_dw_conv_nano.py"
        " --train-json OUT/scenes/coco/annotations/instances_train2017.json"
        " --train-images OUT/scenes/coco/train2017 --output-dir OUT/detector --resume"
        " train.max_iter=560 train.seed=0",
    ),
    "evaluate_detector": (
        "evaluate it",
        0,
        "tools/train_detector.py"
        " --config-file configs/detection/cascade_mask_rcnn_i_d_dw_conv_nano.py --eval-only"
        " --val-json OUT/scenes/coco/annotations/instances_val2017.json"
        " --val-images OUT/scenes/coco/val2017 --output-dir OUT/detector/evaluation"
        " train.init_checkpoint=OUT/detector/model_final.pth",
    ),
    "predict_detector": (
        "predict with it",
        80,
        "tools/predict.py --checkpoint OUT/detector/model_final.pth"
        " --out OUT/predictions/detector --no-legend --resume OUT/scenes/coco/val2017",
    ),
    "train_segmentor": (
        "train UPerNet on i_d_dw_conv_nano",
        600,
        "tools/train_segmentor.py configs/segmentation/i_d_dw_conv_nano_upernet.py"
        " --train-images ADE/images/training --train-masks ADE/annotations/training"
        " --val-images ADE/images/validation --val-masks ADE/annotations/validation"
        f" --classes {CLASSES} --reduce-zero-label --short-side 128 --work-dir OUT/segmentor"
        " --resume --cfg-options randomness.seed=0",
    ),
    "evaluate_segmentor": (
        "evaluate it",
        0,
        "tools/test_segmentor.py OUT/segmentor/i_d_dw_conv_nano_upernet.py"
        " OUT/segmentor/iter_600.pth --work-dir OUT/segmentor/evaluation",
    ),
    "predict_segmentor": (
        "predict with it",
        80,
        "tools/predict.py --checkpoint OUT/segmentor/iter_600.pth --out OUT/predictions/segmentor"
        " --no-legend --resume ADE/images/validation",
    ),
}


@pytest.fixture
def demo():
    return load_tool("demo")


def line(name: str, out: str) -> str:
    return STEPS[name][2].replace("ADE", "OUT/scenes/ADEChallengeData2016").replace("OUT", out)


def test_every_command(demo, tmp_path):
    assert [step.name for step in demo.STEPS] == list(STEPS)
    for step in demo.STEPS:
        assert (step.title, step.total) == STEPS[step.name][:2]
        assert " ".join(step.argv(demo.places(tmp_path))) == line(step.name, str(tmp_path))
        # In the checkout, paths are relative to it.
        places = demo.places(ROOT / "work_dirs/demo")
        assert " ".join(step.argv(places)) == line(step.name, "work_dirs/demo")


def test_the_progress_of_each_step(demo, tmp_path):
    def done() -> dict[str, int]:
        return {s.name: n for s in demo.STEPS if (n := s.position(tmp_path))}

    assert done() == {}
    write_lines(
        tmp_path / "detector/metrics.json",
        {"iteration": 19, "total_loss": 3.0, "loss_mask": 0.5},
        {"iteration": 39, "total_loss": 2.0},
    )
    for time, iteration in (("1", 10), ("2", 30)):
        entry = {"iter": iteration, "loss": 1.0}
        write_lines(tmp_path / f"segmentor/{time}/vis_data/scalars.json", entry)
    for name in ("detector/detections/a.json", "detector/detections/b.json"):
        write_lines(tmp_path / "predictions" / name)
    for name in ("labels/a.png", "labels/b.png", "labels/c.png", "labels/classes.json"):
        write_lines(tmp_path / "predictions/segmentor" / name)
    assert done() == {
        **{"train_detector": 39, "predict_detector": 2},
        **{"train_segmentor": 30, "predict_segmentor": 3},
    }


@pytest.mark.parametrize("cores", [1, 2, 3])
def test_all_that_goes_onto_the_page(demo, recorded, cores, monkeypatch, capsys):  # noqa: F811
    rendered, drawn, ran, prepared = [], [], [], []
    render, prepare = report.render, steps.prepare
    monkeypatch.setattr(report, "render", lambda **given: rendered.append(given) or render(**given))
    monkeypatch.setattr(
        report, "plot", lambda *given: drawn.append(given) or f"<svg>{given[1]}</svg>"
    )
    monkeypatch.setattr(steps, "run_all", lambda *given: ran.append(given))
    monkeypatch.setattr(steps, "prepare", lambda *given: prepared.append(given) or prepare(*given))
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(cores)))
    monkeypatch.setattr("os.cpu_count", lambda: 7)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda number: f"GPU {number}")
    monkeypatch.setattr("platform.machine", lambda: "z80")
    monkeypatch.setattr("platform.python_version", lambda: "3.99")
    assert run_recorded(demo, recorded) == 0

    made = ("scenes", "detector", "segmentor", "predictions", "index.html")
    assert [(given[0], given[1], given[3]) for given in prepared] == [(recorded, made, False)]
    jobs = min(cores, 2)
    names = [
        [
            [s.name for s in ([chain] if isinstance(chain, steps.Step) else chain)]
            for chain in given[0]
        ]
        for given in ran
    ]
    assert names == [[["scenes"]], [list(STEPS)[1:4], list(STEPS)[4:]]]
    for given in ran:
        assert given[1:3] == (recorded, demo.places(recorded)) and given[5:] == (ROOT, jobs)

    (given,) = rendered
    evaluation = "detector/evaluation/results.json", "segmentor/evaluation/2026/2026.json"
    assert given["figures"] == [
        report.Figure("box AP", 40.0, None, evaluation[0]),
        report.Figure("box AP50", 65.4, 60.0, evaluation[0]),
        report.Figure("mask AP", 30.0, None, evaluation[0]),
        report.Figure("mask AP50", 55.0, None, evaluation[0]),
        report.Figure("mIoU", 77.7, 70.0, evaluation[1]),
        report.Figure("pixel accuracy", 95.0, None, evaluation[1]),
    ]
    assert drawn == [
        ({"total_loss": [(9, 3.0)]}, "Cascade Mask R-CNN"),
        ({"loss": [(10, 1.0)]}, "UPerNet"),
    ]
    assert [plot for plot, _ in given["plots"]] == [f"<svg>{title}</svg>" for _, title in drawn]
    assert given["title"] == "i_d_dw_conv_nano in Detectron2 and MMSegmentation"
    assert "on 400 generated scenes in both frameworks and evaluated on 80" in given["introduction"]
    colours = [(80 * number, 9, 9) for number in range(4)]
    assert list(map(tuple, given["legends"]["labels"].values())) == colours
    assert list(given["legends"]["labels"]) == CLASSES.split(",")
    assert given["legends"]["objects"] == demo.object_colours()
    commands = [(c.title, c.line, c.seconds) for c in given["commands"]]
    out = str(recorded)
    assert commands == [
        (title, f"python {line(name, out)}", 2.0) for name, (title, *_) in STEPS.items()
    ]
    facts = given["facts"]
    assert (facts.pop("python"), facts.pop("machine")) == ("3.99", "z80, 7 cores, GPU 0")
    assert facts == report.versions()
    assert capsys.readouterr().out.splitlines() == [
        "          box AP   40.0",
        "        box AP50   65.4  (at least 60)",
        "         mask AP   30.0",
        "       mask AP50   55.0",
        "            mIoU   77.7  (at least 70)",
        "  pixel accuracy   95.0",
        f"0.2 minutes of steps, {jobs} in parallel; the page: {recorded / 'index.html'}",
    ]


def test_without_a_gpu(demo, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert demo.device() == "no GPU"


def test_the_first_scenes_beside_their_truth(demo, tmp_path, monkeypatch):
    pytest.importorskip("pycocotools")
    scenes.write_scenes(tmp_path / "scenes", scenes.SceneOptions(train=1, val=8, size=64))
    colours = [[9 * number, 8, 7] for number in range(4)]
    write_lines(
        tmp_path / "predictions/segmentor/labels/classes.json",
        [{"colour": colour} for colour in colours],
    )
    drawn, coloured, labelled = [], [], []
    grey, red = np.full((2, 64, 64, 3), [[[[90]]], [[[99]]]], np.uint8)

    def draw_instances(image, boxes, masks, names, given):
        drawn.append((image, boxes, masks, names, given))
        return grey

    def segmentation_drawer(classes, palette):
        coloured.append((classes, palette))
        return lambda image, labels: labelled.append((image, labels)) or red

    monkeypatch.setattr(demo.drawing, "draw_instances", draw_instances)
    monkeypatch.setattr(demo.drawing, "segmentation_drawer", segmentation_drawer)
    rows = demo.picture_rows(tmp_path)
    assert coloured == [(tuple(CLASSES.split(",")), colours)]
    names = [f"{number:012d}" for number in range(2, 8)]
    assert [row.name for row in rows] == names
    predictions, palette = tmp_path / "predictions", demo.object_colours()
    assert len(set(palette.values())) == 3 and list(palette) == CLASSES.split(",")[1:]
    truth = json.loads((tmp_path / "scenes/coco/annotations/instances_val2017.json").read_text())
    for number, (row, objects, labels) in enumerate(zip(rows, drawn, labelled, strict=True), 1):
        assert row.pictures == {
            "objects: truth": predictions / f"truth/{row.name}_objects.jpg",
            "objects: prediction": predictions / f"detector/overlays/{row.name}.jpg",
            "labels: truth": predictions / f"truth/{row.name}_labels.jpg",
            "labels: prediction": predictions / f"segmentor/overlays/ADE_val_{number:08d}.jpg",
        }
        for name, picture in (("objects", grey), ("labels", red)):
            expected = io.BytesIO()
            Image.fromarray(picture).save(expected, "JPEG", quality=92)
            assert row.pictures[f"{name}: truth"].read_bytes() == expected.getvalue()
        photo = Image.open(tmp_path / f"scenes/coco/val2017/{row.name}.jpg")
        path = f"scenes/ADEChallengeData2016/annotations/validation/ADE_val_{number:08d}.png"
        masks = np.asarray(Image.open(tmp_path / path)).astype(int)
        image, boxes, shapes, kinds, given = objects
        for one in (image, labels[0]):
            np.testing.assert_array_equal(one, np.asarray(photo))
        np.testing.assert_array_equal(labels[1], masks - 1)
        found = [a for a in truth["annotations"] if a["image_id"] == number + 1]
        assert kinds == [CLASSES.split(",")[a["category_id"]] for a in found]
        assert given == [palette[kind] for kind in kinds]
        expected = [[x, y, x + w, y + h] for x, y, w, h in (a["bbox"] for a in found)]
        np.testing.assert_array_equal(boxes, expected)
        union = sum(shape * (a["category_id"] + 1) for shape, a in zip(shapes, found, strict=True))
        np.testing.assert_array_equal(np.maximum(union, 1), masks)
    assert Path(rows[0].pictures["objects: truth"]).is_file()
