"""Segmentors for :mod:`dense.run_report`: IoU of each class, and images judged by their mIoU."""

import re
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.config import Config
from mmengine.registry import init_default_scope
from mmseg.evaluation import IoUMetric
from mmseg.registry import DATASETS
from mmseg.utils import register_all_modules
from tqdm import tqdm

from dense import browsing, drawing, page
from dense.images import read_image
from dense.openmmlab.checkpoints import newest_whole
from dense.openmmlab.config import config_values as config_values
from dense.recipes import config_in
from dense.run_report import Judged, Verdict
from dense.segmentation.browsing import IGNORED, mask_reader
from dense.segmentation.predictor import Predictor
from dense.waiting import waiting

# A line of MMSegmentation's table in the log.
_ROW = re.compile(r"^\|\s*(.+?)\s*\|\s*(nan|[\d.]+)\s*\|\s*(nan|[\d.]+)\s*\|$")


def per_class(run: Path) -> page.Table | None:
    """IoU and accuracy of each class in the last table of the logs; None without one."""
    table: list[tuple[str, float, float]] = []
    for log in sorted(run.glob("[0-9]*_[0-9]*/*.log")):
        inside = False
        for line in log.read_text(errors="replace").splitlines():
            if "per class results" in line:
                table, inside = [], True
            elif inside and (row := _ROW.match(line)):
                table.append((row[1], float(row[2]), float(row[3])))
            elif table and not line.startswith(("|", "+")):
                inside = False
    if not table:
        return None
    rows = [
        [name, page.Cell(_or_none(iou), share=0.0 if iou != iou else iou / 100), _or_none(accuracy)]
        for name, iou, accuracy in table
    ]
    rows.sort(key=lambda row: -row[1].share)
    return page.Table(["class", "IoU (%)", "accuracy (%)"], rows)


def judged(run: Path, images: int) -> Verdict:
    """Validation images predicted by the newest checkpoint, by the mIoU of the image alone.

    Raises:
        FileNotFoundError: there is no checkpoint yet.
    """
    checkpoint, _ = newest_whole(run)
    if checkpoint is None:
        raise FileNotFoundError("there is no checkpoint yet")
    config = str(config_in(run))
    register_all_modules(init_default_scope=False)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with waiting(f"loading {checkpoint}"):
        predict = Predictor(config, str(checkpoint), device)
    cfg = Config.fromfile(config)
    init_default_scope(cfg.get("default_scope", "mmseg"))
    dataset = DATASETS.build(cfg.val_dataloader.dataset)
    read = mask_reader(cfg.val_dataloader.dataset)
    draw = drawing.segmentation_drawer(predict.classes, predict.palette, named=False)
    verdicts = []
    wanted = browsing.chosen(len(dataset), images, seed=0)
    for index in tqdm(wanted, "judging validation images", delay=2, leave=False):
        info = dataset.get_data_info(index)
        image, labels = read_image(info["img_path"]), read(info)["gt_seg_map"]
        # As small as the masks: the arrays of all images are kept.
        found = predict(image).astype(labels.dtype)
        score = _miou(found, labels, len(predict.classes))
        if score is None:
            continue
        path = info["img_path"]
        pictures = {
            "photo": partial(read_image, path),
            "truth": partial(_draw, draw, path, labels),
            "prediction": partial(_draw, draw, path, found),
        }
        verdicts.append(Judged(Path(path).name, score, pictures))
    colours = dict(zip(predict.classes, predict.palette, strict=True))
    return Verdict(verdicts, "mIoU of the image alone", f"those of {checkpoint.name}", colours)


def _draw(draw: Any, path: str, labels: np.ndarray) -> np.ndarray:
    return draw(read_image(path), labels.astype(int))


def _miou(found: np.ndarray, truth: np.ndarray, classes: int) -> float | None:
    """Mean IoU in percent over the classes that occur in truth or prediction."""
    areas = IoUMetric.intersect_and_union(
        torch.from_numpy(found.astype(np.int64)),
        torch.from_numpy(truth.astype(np.int64)),
        classes,
        IGNORED,
    )
    intersection, union, _, labelled = (area.numpy() for area in areas)
    if not labelled.any():
        return None
    seen = union > 0
    return 100 * float((intersection[seen] / union[seen]).mean())


def _or_none(value: float) -> float | None:
    return None if value != value else value
