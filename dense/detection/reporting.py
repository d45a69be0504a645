"""Detectors for :mod:`dense.run_report`: AP of each class, and images judged by pycocotools."""

import contextlib
import io
import json
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
import yaml
from detectron2.config import LazyConfig, instantiate
from detectron2.data import MetadataCatalog
from detectron2.structures import BitMasks, Boxes, Instances
from pycocotools import mask as rle
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from tqdm import tqdm

from dense import browsing, drawing, page
from dense.detection.browsing import drawn, truth
from dense.detection.config import load_config
from dense.run_report import Judged, Verdict

# Detections below are not drawn.
SCORE = 0.5
_RESULTS = "inference/coco_instances_results.json"


def config_values(path: Path) -> dict[str, Any]:
    """A config as plain dicts and lists, as ``config.yaml`` has it."""
    if path.suffix != ".py":
        return yaml.safe_load(path.read_text())
    with TemporaryDirectory() as folder:
        saved = Path(folder, "config.yaml")
        LazyConfig.save(load_config(str(path)), str(saved))
        return yaml.safe_load(saved.read_text())


def per_class(run: Path) -> page.Table | None:
    """AP of each class in ``results.json``, box and mask; None without it."""
    try:
        results = json.loads((run / "results.json").read_text())
    except (OSError, ValueError):
        return None
    kinds = {"bbox": "box AP", "segm": "mask AP"}
    columns = [kind for kind in kinds if kind in results]
    names = dict.fromkeys(key for kind in columns for key in results[kind] if key.startswith("AP-"))
    if not names:
        return None
    rows = []
    for name in names:
        values = [results[kind].get(name) for kind in columns]
        rows.append([name.removeprefix("AP-"), *(_bar(value) for value in values)])
    rows.sort(key=lambda row: -row[1].share)
    return page.Table(["class", *(kinds[kind] for kind in columns)], rows)


def _bar(value: float | None) -> page.Cell:
    missing = value is None or value != value
    return page.Cell(None if missing else value, share=0.0 if missing else value / 100)


def judged(run: Path, images: int) -> Verdict:
    """Validation images and the detections of the last evaluation, by AP50 of the image alone.

    Raises:
        FileNotFoundError: no evaluation has left its detections.
    """
    found = run / _RESULTS
    if not found.is_file():
        raise FileNotFoundError("no evaluation has left its detections in inference/ yet")
    cfg = load_config(str(run / "config.yaml"))
    dicts = instantiate(cfg.dataloader.test.dataset)
    named = cfg.dataloader.test.dataset.names
    metadata = MetadataCatalog.get(named if isinstance(named, str) else named[0])
    names = list(metadata.thing_classes)
    contiguous = metadata.thing_dataset_id_to_contiguous_id
    colours = dict(zip(names, drawing.class_colours(len(names)), strict=True))
    detections = json.loads(found.read_text())
    chosen = [dicts[index] for index in browsing.chosen(len(dicts), images, seed=0)]
    # loadRes would give boxes a segmentation.
    kind = "segm" if detections and "segmentation" in detections[0] else "bbox"
    # pycocotools prints what it does.
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO(metadata.json_file)
        results = coco.loadRes(detections) if detections else None
    verdicts = []
    for entry in tqdm(chosen, "judging validation images", delay=2, leave=False):
        score = _ap50(coco, results, entry["image_id"], kind)
        if score is None:
            continue
        own = results.imgToAnns[entry["image_id"]] if results else []
        own = [d for d in own if d["score"] >= SCORE]
        pictures = {
            "truth": partial(_draw_truth, entry, colours),
            "prediction": partial(_draw_found, entry, own, kind, colours, contiguous),
        }
        verdicts.append(Judged(Path(entry["file_name"]).name, score, pictures))
    noun = {"segm": "mask", "bbox": "box"}[kind]
    return Verdict(
        verdicts,
        f"{noun} AP50 on the image alone",
        f"the detections of the last evaluation; those with a score of {SCORE} and more are drawn",
        colours,
    )


def _ap50(coco: COCO, results: COCO | None, image: int, kind: str) -> float | None:
    """AP at IoU 0.5 of one image in percent; None if nothing is annotated in it."""
    if not coco.getAnnIds(imgIds=[image], iscrowd=False):
        return None
    if results is None:
        return 0.0
    with contextlib.redirect_stdout(io.StringIO()):
        evaluation = COCOeval(coco, results, kind)
        evaluation.params.imgIds = [image]
        evaluation.params.iouThrs = np.array([0.5])
        evaluation.evaluate()
        evaluation.accumulate()
    # Threshold, recall, class, area (the first is all), detections (the last is 100).
    precision = evaluation.eval["precision"][0, :, :, 0, -1]
    valid = precision[precision > -1]
    return 100 * float(valid.mean()) if valid.size else None


def _draw_truth(entry: dict[str, Any], colours: drawing.Colours) -> np.ndarray:
    return drawn(*truth(entry), colours)


def _draw_found(
    entry: dict[str, Any],
    detections: list[dict[str, Any]],
    kind: str,
    colours: drawing.Colours,
    contiguous: dict[int, int],
) -> np.ndarray:
    image, _ = truth(entry)
    boxes = np.array([d["bbox"] for d in detections], np.float32).reshape(-1, 4)
    boxes[:, 2:] += boxes[:, :2]
    instances = Instances(image.shape[:2], gt_boxes=Boxes(torch.from_numpy(boxes)))
    instances.gt_classes = torch.tensor([contiguous[d["category_id"]] for d in detections])
    if detections and kind == "segm":
        masks = np.stack([rle.decode(d["segmentation"]).astype(bool) for d in detections])
        instances.gt_masks = BitMasks(torch.from_numpy(masks))
    return drawn(image, instances, colours)
