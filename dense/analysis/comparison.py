"""Compare networks trained with one recipe: parameters, FLOPs, training time, top-1."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean, stdev

import timm

from dense import files, metrics
from dense.analysis import complexity

HEAD = (
    "| network | parameters | FLOPs | minutes a run | top-1, mean ± spread | seeds |",
    "| --- | --- | --- | --- | --- | --- |",
)


@dataclass(frozen=True)
class Entry:
    """The results of one network over several seeds.

    Attributes:
        name: model name.
        parameters: number of parameters, classifier included.
        flops: multiply-adds for one image of the training size.
        minutes: wall time of each run, start-up and validation included.
        top1: accuracy of each run after its last epoch, in percent.
    """

    name: str
    parameters: int
    flops: int
    minutes: tuple[float, ...]
    top1: tuple[float, ...]

    def row(self) -> str:
        """A row of the Markdown table; the spread is the standard deviation over seeds."""
        spread = f" ± {stdev(self.top1):.1f}" if len(self.top1) > 1 else ""
        cells = (
            f"`{self.name}`",
            f"{self.parameters / 1e6:.2f}M",
            f"{self.flops / 1e9:.3f}G",
            f"{mean(self.minutes):.1f}",
            f"{mean(self.top1):.1f}{spread}",
            " ".join(f"{value:.1f}" for value in self.top1),
        )
        return f"| {' | '.join(cells)} |"


def compare(
    runs: Mapping[str, Sequence[Path]],
    seconds: Mapping[Path, float],
    num_classes: int,
    img_size: int,
    out: Path,
) -> list[Entry]:
    """Read training logs and write ``comparison.json``, ``.md`` and ``.png`` (means over seeds).

    Args:
        runs: model name to the work folders of its seeds.
        seconds: work folder to the wall time of its run.
        num_classes: outputs of the classifiers.
        img_size: side of the images in pixels.
        out: the folder to write into.

    Raises:
        ValueError: a work folder has no log, or the log has no validation.
    """
    entries, curves = [], []
    for name, folders in runs.items():
        logs = [metrics.read_run(folder) for folder in folders]
        for folder, log in zip(folders, logs, strict=True):
            if "top1" not in log.metrics:
                raise ValueError(f"{folder} has no validation in its log")
        network = timm.create_model(name, num_classes=num_classes, img_size=img_size)
        entries.append(
            Entry(
                name,
                complexity.parameters(network),
                complexity.flops(network, (1, 3, img_size, img_size)),
                tuple(seconds[folder] / 60 for folder in folders),
                tuple(log.metrics["top1"][-1][1] for log in logs),
            )
        )
        losses, rates = ([getattr(log, key) for log in logs] for key in ("loss", "rate"))
        top1 = {"top1": _mean([log.metrics["top1"] for log in logs])}
        curves.append(metrics.Run(name, _mean(losses), _mean(rates), top1))
    files.write(out / "comparison.json", json.dumps([asdict(e) for e in entries], indent=1))
    files.write(out / "comparison.md", table(entries) + "\n")
    metrics.plot(curves, out / "comparison.png")
    return entries


def table(entries: Sequence[Entry]) -> str:
    """All entries as a Markdown table."""
    return "\n".join((*HEAD, *(entry.row() for entry in entries)))


def _mean(series: Sequence[metrics.Points]) -> metrics.Points:
    """The mean of several series, at the iterations that all of them have."""
    by_step = [dict(points) for points in series]
    common = set.intersection(*(set(points) for points in by_step))
    return [(step, mean(points[step] for points in by_step)) for step in sorted(common)]
