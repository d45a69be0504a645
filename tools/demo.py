"""Train a detector and a segmentor on generated scenes, in minutes on a CPU.

    python tools/demo.py

Generates scenes, trains i_d_dw_conv_nano on them in Detectron2 and in MMSegmentation, at the same
time where there are two cores, evaluates both on held-out scenes, predicts, and writes one HTML
page, which lists the command of every step.
After a kill the same command continues; --fresh starts over.
"""

import argparse
import contextlib
import json
import os
import platform
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from dense.waiting import waiting

with waiting("importing PyTorch"):
    from dense import drawing, files, page, prediction, report, runs, steps
    from dense.demo import scenes
    from dense.images import read_image
    from dense.steps import State, Step, StepError

ROOT = Path(__file__).resolve().parents[1]
BACKBONE = "i_d_dw_conv_nano"
DETECTION_CONFIG = f"configs/detection/cascade_mask_rcnn_{BACKBONE}.py"
SEGMENTATION_CONFIG = f"configs/segmentation/{BACKBONE}_upernet.py"
# The config has 640. Box AP50 was 65 after 480 iterations, too near to the least, 79 after 560.
DETECTION_ITERATIONS = 560
SEGMENTATION_ITERATIONS = 600
LEAST_BOX_AP50 = 60.0
LEAST_MIOU = 70.0
SHOWN = 6
SEED = 0  # of both trainings, so that a run can be compared with the next
DATA = scenes.SceneOptions()

PAGE = "index.html"
MADE = ("scenes", "detector", "segmentor", "predictions", PAGE)


def places(out: Path) -> dict[str, str]:
    """The values in the commands; paths are relative to the repository's root where they can be."""
    out = out.relative_to(ROOT) if out.is_relative_to(ROOT) else out
    return {
        "out": str(out),
        "coco": str(out / "scenes" / scenes.COCO_FOLDER),
        "ade": str(out / "scenes" / scenes.ADE_FOLDER),
        "detection_config": DETECTION_CONFIG,
        "segmentation_config": SEGMENTATION_CONFIG,
        "saved_segmentation_config": str(out / "segmentor" / Path(SEGMENTATION_CONFIG).name),
        "segmentor_weights": str(out / "segmentor" / f"iter_{SEGMENTATION_ITERATIONS}.pth"),
        "classes": ",".join(scenes.SEGMENTATION_CLASSES),
    }


SCENES = Step("scenes", "generate scenes", "tools/make_scenes.py {out}/scenes")
DETECTOR = (
    Step(
        "train_detector",
        f"train Cascade Mask R-CNN on {BACKBONE}",
        "tools/train_detector.py --config-file {detection_config}"
        " --train-json {coco}/annotations/instances_train2017.json"
        " --train-images {coco}/train2017 --output-dir {out}/detector --resume"
        f" train.max_iter={DETECTION_ITERATIONS} train.seed={SEED}",
        DETECTION_ITERATIONS,
        lambda out: last_step(lambda: report.detectron2_losses(out / "detector" / "metrics.json")),
    ),
    Step(
        "evaluate_detector",
        "evaluate it",
        "tools/train_detector.py --config-file {detection_config} --eval-only"
        " --val-json {coco}/annotations/instances_val2017.json --val-images {coco}/val2017"
        " --output-dir {out}/detector/evaluation"
        " train.init_checkpoint={out}/detector/model_final.pth",
    ),
    Step(
        "predict_detector",
        "predict with it",
        "tools/predict.py --checkpoint {out}/detector/model_final.pth"
        " --out {out}/predictions/detector --no-legend --resume {coco}/val2017",
        DATA.val,
        lambda out: count(out / "predictions" / "detector" / prediction.DETECTIONS, "*.json"),
    ),
)
SEGMENTOR = (
    Step(
        "train_segmentor",
        f"train UPerNet on {BACKBONE}",
        "tools/train_segmentor.py {segmentation_config}"
        " --train-images {ade}/images/training --train-masks {ade}/annotations/training"
        " --val-images {ade}/images/validation --val-masks {ade}/annotations/validation"
        " --classes {classes} --reduce-zero-label --short-side 128"
        " --work-dir {out}/segmentor --resume"
        f" --cfg-options randomness.seed={SEED}",
        SEGMENTATION_ITERATIONS,
        lambda out: last_step(lambda: report.mmengine_losses(out / "segmentor")),
    ),
    Step(
        "evaluate_segmentor",
        "evaluate it",
        "tools/test_segmentor.py {saved_segmentation_config} {segmentor_weights}"
        " --work-dir {out}/segmentor/evaluation",
    ),
    Step(
        "predict_segmentor",
        "predict with it",
        "tools/predict.py --checkpoint {segmentor_weights}"
        " --out {out}/predictions/segmentor --no-legend --resume {ade}/images/validation",
        DATA.val,
        lambda out: count(out / "predictions" / "segmentor" / prediction.LABELS, "*.png"),
    ),
)
STEPS = (SCENES, *DETECTOR, *SEGMENTOR)


def last_step(read: Callable[[], report.Curves]) -> int:
    try:
        return max((points[-1][0] for points in read().values()), default=0)
    except FileNotFoundError:
        return 0


def count(folder: Path, pattern: str) -> int:
    return sum(1 for _ in folder.glob(pattern))


def figures(out: Path) -> list[report.Figure]:
    """The metrics on the held-out scenes."""
    detection_file = out / "detector" / "evaluation" / "results.json"
    found = json.loads(detection_file.read_text())
    segmentation_file, measured = report.mmengine_results(out / "segmentor" / "evaluation")
    source = detection_file.relative_to(out).as_posix()
    rows = [
        report.Figure("box AP", found["bbox"]["AP"], None, source),
        report.Figure("box AP50", found["bbox"]["AP50"], LEAST_BOX_AP50, source),
        report.Figure("mask AP", found["segm"]["AP"], None, source),
        report.Figure("mask AP50", found["segm"]["AP50"], None, source),
    ]
    source = segmentation_file.relative_to(out).as_posix()
    rows.append(report.Figure("mIoU", measured["mIoU"], LEAST_MIOU, source))
    rows.append(report.Figure("pixel accuracy", measured["aAcc"], None, source))
    return rows


def picture_rows(out: Path) -> list[report.Row]:
    """The first held-out scenes: ground truth and predictions of both models."""
    from pycocotools.coco import COCO

    coco_folder = out / "scenes" / scenes.COCO_FOLDER
    ade_folder = out / "scenes" / scenes.ADE_FOLDER
    truth = out / "predictions" / "truth"
    truth.mkdir(parents=True, exist_ok=True)
    with contextlib.redirect_stdout(None):
        coco = COCO(str(coco_folder / "annotations" / "instances_val2017.json"))
    draw_labels = drawing.segmentation_drawer(scenes.SEGMENTATION_CLASSES, palette(out))

    rows = []
    masks = sorted((ade_folder / "annotations" / "validation").iterdir())
    for image_id, mask_path in list(zip(sorted(coco.imgs), masks, strict=True))[:SHOWN]:
        name = Path(coco.imgs[image_id]["file_name"]).stem
        image = read_image(coco_folder / "val2017" / f"{name}.jpg")
        annotations = coco.loadAnns(coco.getAnnIds(imgIds=image_id))
        x, y, w, h = np.array([a["bbox"] for a in annotations], float).T
        pictures = {
            "objects: truth": truth / f"{name}_objects.jpg",
            "objects: prediction": out / "predictions/detector/overlays" / f"{name}.jpg",
            "labels: truth": truth / f"{name}_labels.jpg",
            "labels: prediction": out / "predictions/segmentor/overlays" / f"{mask_path.stem}.jpg",
        }
        drawn = drawing.draw_instances(
            image,
            np.stack([x, y, x + w, y + h], axis=1),
            np.stack([coco.annToMask(a) for a in annotations]),
            [coco.cats[a["category_id"]]["name"] for a in annotations],
            [object_colours()[coco.cats[a["category_id"]]["name"]] for a in annotations],
        )
        Image.fromarray(drawn).save(pictures["objects: truth"], quality=92)
        labels = np.asarray(Image.open(mask_path)).astype(int) - 1
        Image.fromarray(draw_labels(image, labels)).save(pictures["labels: truth"], quality=92)
        rows.append(report.Row(name, pictures))
    return rows


def object_colours() -> dict[str, tuple[int, int, int]]:
    """The colours of the detector's predictions, whose classes are the JSON's categories."""
    return dict(zip(scenes.SHAPES, drawing.class_colours(len(scenes.SHAPES)), strict=True))


def palette(out: Path) -> list[list[int]]:
    """The colours of the segmentor's predictions."""
    classes = json.loads((out / "predictions/segmentor/labels/classes.json").read_text())
    return [entry["colour"] for entry in classes]


def write_page(out: Path, state: State) -> list[report.Figure]:
    measured = figures(out)
    detector_losses = report.detectron2_losses(out / "detector" / "metrics.json")
    html = report.render(
        title=f"{BACKBONE} in Detectron2 and MMSegmentation",
        introduction=(
            f"One backbone, trained from random weights on {DATA.train} generated scenes in both "
            f"frameworks and evaluated on {DATA.val} held-out ones. The scenes are made to be "
            "easy: the results show that all parts work together, not how well on real photos."
        ),
        figures=measured,
        plots=[
            (
                report.plot(detector_losses, "Cascade Mask R-CNN"),
                "The box losses rise while the detector learns: better proposals match more "
                "objects, and only those that match have a box loss.",
            ),
            (report.plot(report.mmengine_losses(out / "segmentor"), "UPerNet"), ""),
        ],
        rows=picture_rows(out),
        legends={
            "objects": object_colours(),
            "labels": dict(zip(scenes.SEGMENTATION_CLASSES, palette(out), strict=True)),
        },
        commands=[
            report.Command(step.title, step.line(places(out)), state.seconds(step))
            for step in STEPS
        ],
        facts={
            "python": platform.python_version(),
            **report.versions(),
            "machine": f"{platform.machine()}, {os.cpu_count()} cores, {device()}",
        },
    )
    files.write(out / PAGE, html)
    return measured


def device() -> str:
    import torch

    return torch.cuda.get_device_name(0) if torch.cuda.is_available() else "no GPU"


def demo(out: Path, fresh: bool) -> None:
    """Run the steps and write the page; a StepError if a result is below its minimum."""
    digest = steps.sources_digest(
        ROOT,
        ("backbones", "dense", "configs", "tools"),
        (Path(__file__), Path(report.__file__), Path(page.__file__)),
    )
    with runs.locked(out) as lock:
        state = steps.prepare(out, MADE, digest, fresh)
        jobs = min(2, len(os.sched_getaffinity(0)))
        for row in ([SCENES], [DETECTOR, SEGMENTOR]):
            steps.run_all(row, out, places(out), state, lock, ROOT, jobs)
        with waiting("writing the page"):
            measured = write_page(out, state)
    for figure in measured:
        least = "" if figure.least is None else f"  (at least {figure.least:.0f})"
        print(f"{figure.name:>16} {figure.value:6.1f}{least}")
    total = sum(state.seconds(step) for step in STEPS)
    print(f"{total / 60:.1f} minutes of steps, {jobs} in parallel; the page: {out / PAGE}")
    missed = [f"{f.name} is {f.value:.1f}, below {f.least:.0f}" for f in measured if f.missed]
    if missed:
        raise StepError("; ".join(missed))


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--out", default="work_dirs/demo", help="output folder (%(default)s)")
    add("--fresh", action="store_true", help="remove earlier results and start over")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    return steps.run_tool("demo", lambda: demo(Path(args.out).resolve(), args.fresh))


if __name__ == "__main__":
    sys.exit(main())
