"""Top-1, top-5 and ReaL accuracy, over all images and per class."""

import csv
import io
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from mmengine.evaluator import BaseMetric
from mmengine.logging import print_log
from mmengine.registry import METRICS
from timm.data import RealLabelsImagenet

from dense import files


@METRICS.register_module()
class ClassificationMetric(BaseMetric):
    """mmengine metric: ``top1`` and ``top5`` in percent, ``images_per_second``; logs each class.

    >>> val_evaluator = dict(type="ClassificationMetric", out_dir="work_dirs/mine/evaluation")

    Args:
        real_labels: ``real.json`` of "Are we done with ImageNet?" (arXiv 2006.07159), or ``"timm"``
            for timm's copy. Adds ``real``, in percent; the file names must be those of ImageNet's
            validation set.
        filenames: the data set's file names, by index; required with ``real_labels``.
        out_dir: folder for ``per_class.csv`` (class, images, accuracy) and ``confusion.csv`` (rows:
            true classes, columns: predicted ones); None writes neither.
        **kwargs: arguments of mmengine's ``BaseMetric``.

    Raises:
        ValueError: ``real_labels`` without ``filenames``.
    """

    default_prefix = None

    def __init__(
        self,
        real_labels: str | None = None,
        filenames: Sequence[str] | None = None,
        out_dir: str | None = None,
        **kwargs: Any,
    ):
        super().__init__(**kwargs)
        if real_labels and filenames is None:
            raise ValueError("real_labels needs the file names of the images")
        self.real = _real_labels(real_labels) if real_labels else None
        self.filenames, self.out_dir = filenames, out_dir
        self._started: float | None = None

    def process(self, data_batch: Any, data_samples: Sequence[dict]) -> None:
        """Keep label, index and top five of each image; the first batch is not timed."""
        self.results.extend((s["label"], s["index"], *s["best"].tolist()) for s in data_samples)
        if self._started is None:
            self._started, self._first = time.perf_counter(), len(data_samples)

    def evaluate(self, size: int) -> dict[str, float]:
        """As in mmengine, with the images per second of this process."""
        timed = len(self.results) - (self._first if self._started is not None else 0)
        elapsed = time.perf_counter() - self._started if self._started is not None else 0.0
        self._started = None
        metrics = super().evaluate(size)
        if timed > 0 and elapsed > 0:
            metrics["images_per_second"] = round(timed / elapsed, 1)
        return metrics

    def compute_metrics(self, results: list[tuple[int, ...]]) -> dict[str, float]:
        """Percentages over the images of all processes.

        Args:
            results: ``(label, index, best, second, ...)`` per image. An image that also replaces
                undecodable ones counts once, unless indices are unknown (-1).
        """
        table = np.asarray(results)
        if (table[:, 1] >= 0).all():
            table = table[np.unique(table[:, 1], return_index=True)[1]]
        labels, best = table[:, 0], table[:, 2:]
        hit = best == labels[:, None]
        metrics = {"top1": 100 * float(hit[:, 0].mean()), "top5": 100 * float(hit.any(1).mean())}
        if self.real is not None:
            metrics["real"] = self._real(table[:, 1], best[:, 0])
        if self.dataset_meta:
            self._tell_classes(labels, best[:, 0])
        return metrics

    def _tell_classes(self, labels: np.ndarray, best: np.ndarray) -> None:
        names = list(self.dataset_meta["classes"])
        confusion = np.zeros((len(names), len(names)), np.int64)
        np.add.at(confusion, (labels, best), 1)
        rows = [
            (name, int(n), f"{100 * c / n:.2f}" if n else "")
            for name, n, c in zip(names, confusion.sum(1), confusion.diagonal(), strict=True)
        ]
        _log_table(rows)
        if self.out_dir:
            self._write(rows, confusion)

    def _real(self, indices: np.ndarray, best: np.ndarray) -> float:
        judged = []
        for index, predicted in zip(indices.tolist(), best.tolist(), strict=True):
            name = Path(self.filenames[index]).with_suffix(".JPEG").name
            if name not in self.real:
                raise ValueError(
                    f"{name} has no ReaL label: names must be like ILSVRC2012_val_00000001.JPEG"
                )
            valid = self.real[name]
            if valid:
                judged.append(predicted in valid)
        return 100 * float(np.mean(judged)) if judged else float("nan")

    def _write(self, rows: list[tuple[str, int, str]], confusion: np.ndarray) -> None:
        names = [name for name, *_ in rows]
        out = Path(self.out_dir)
        out.mkdir(parents=True, exist_ok=True)
        _write_csv(out / "per_class.csv", [("class", "images", "top1"), *rows])
        _write_csv(
            out / "confusion.csv",
            [("", *names), *((n, *row) for n, row in zip(names, confusion.tolist(), strict=True))],
        )


def _log_table(rows: list[tuple[str, int, str]]) -> None:
    """Log images and accuracy of each class; of more than 50 the least accurate 20."""
    shown, title = rows, "per class"
    if len(rows) > 50:
        tested = [row for row in rows if row[1]]
        shown = sorted(tested, key=lambda row: float(row[2]))[:20]
        title = f"the {len(shown)} least accurate of {len(rows)} classes"
    width = max(len(name) for name, *_ in [("class",), *shown])
    lines = [f"{name:{width}} {n:>7} {top1:>7}" for name, n, top1 in shown]
    head = f"{'class':{width}} {'images':>7} {'top1':>7}"
    print_log("\n".join([f"{title}:", head, *lines]), logger="current")


def _real_labels(source: str) -> dict[str, list[int]]:
    """The valid classes of ImageNet's validation images, by file name."""
    if source == "timm":
        return RealLabelsImagenet([""] * 50_000).real_labels
    labels = json.loads(Path(source).read_text())
    return {f"ILSVRC2012_val_{i:08d}.JPEG": valid for i, valid in enumerate(labels, start=1)}


def _write_csv(path: Path, rows: list[tuple]) -> None:
    text = io.StringIO(newline="")
    csv.writer(text).writerows(rows)
    files.write(path, text.getvalue())
