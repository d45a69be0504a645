"""Classifiers for :mod:`dense.run_report`: top-1 of each class, and images by their probability."""

import csv
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.config import Config
from mmengine.registry import DATASETS
from PIL import Image
from tqdm import tqdm

from dense import browsing, page
from dense.images import to_rgb
from dense.openmmlab.checkpoints import newest_whole
from dense.openmmlab.config import config_values as config_values
from dense.pretraining.data import ImageStream
from dense.pretraining.predictor import Predictor, readable
from dense.recipes import config_in
from dense.run_report import Judged, Verdict
from dense.waiting import waiting


def per_class(run: Path) -> page.Table | None:
    """Top-1 of each class in ``evaluation/per_class.csv``; None without it."""
    path = run / "evaluation/per_class.csv"
    if not path.is_file():
        return None
    with open(path, newline="") as file:
        lines = list(csv.DictReader(file))
    names = readable([line["class"] for line in lines])
    rows = []
    for name, line in zip(names, lines, strict=True):
        top1 = float(line["top1"]) if line["top1"] else None
        rows.append([name, page.Cell(top1, share=(top1 or 0) / 100), int(line["images"])])
    rows.sort(key=lambda row: -row[1].share)
    return page.Table(["class", "top-1 (%)", "images"], rows)


def judged(run: Path, images: int) -> Verdict:
    """Validation images predicted by the newest checkpoint, by the probability of their class.

    Raises:
        FileNotFoundError: there is no checkpoint yet, or the data are shards.
    """
    checkpoint, _ = newest_whole(run)
    if checkpoint is None:
        raise FileNotFoundError("there is no checkpoint yet")
    config = str(config_in(run))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with waiting(f"loading {checkpoint}"):
        predict = Predictor(config, str(checkpoint), device)
    with waiting("listing the validation photos"):
        dataset = DATASETS.build(Config.fromfile(config).val_dataloader.dataset)
    if isinstance(dataset, ImageStream):
        raise FileNotFoundError("shards are read in order, none at random")
    verdicts = []
    wanted = browsing.chosen(len(dataset), images, seed=0)
    for index in tqdm(wanted, "judging validation images", delay=2, leave=False):
        image, label = _photo(dataset, index)
        scores = predict(image)
        lines = [f"{predict.classes[label]} {100 * scores[label]:.0f}% (truth)"]
        lines += [
            f"{predict.classes[other]} {100 * scores[other]:.0f}%"
            for other in scores.argsort()[::-1][:3]
            if other != label
        ]
        pictures = {", ".join(lines): partial(_draw, dataset, index)}
        verdicts.append(Judged(dataset.filename(index), 100 * float(scores[label]), pictures))
    return Verdict(
        verdicts, "the probability of its class in percent", f"those of {checkpoint.name}"
    )


def _photo(dataset: Any, index: int) -> tuple[np.ndarray, int]:
    file, label = dataset.reader[index]
    with file, Image.open(file) as opened:
        return np.asarray(to_rgb(opened)), label


def _draw(dataset: Any, index: int) -> np.ndarray:
    return _photo(dataset, index)[0]
