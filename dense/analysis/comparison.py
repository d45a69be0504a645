"""Networks trained alike, side by side: what they cost, and what they have learned."""

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
    """One network over several seeds.

    Attributes:
        name: of the network.
        parameters: with its classifier.
        flops: multiply-adds of an image of the size it was trained at.
        minutes: the whole of each run, its start and validation too.
        top1: after the last epoch, in percent, one a seed.
    """

    name: str
    parameters: int
    flops: int
    minutes: tuple[float, ...]
    top1: tuple[float, ...]

    def row(self) -> str:
        """A line of a Markdown table; the spread is the standard deviation over seeds."""
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
    """Read trainings, write ``comparison.json``, ``.md`` and ``.png``: curves are seeds' means.

    Args:
        runs: by network, the work folders of its seeds.
        seconds: what each took.
        num_classes: outputs of the networks.
        img_size: side of the images in pixels.
        out: the folder to write into.

    Raises:
        ValueError: a work folder without a training's log or without a validation in it.
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
    """Markdown."""
    return "\n".join((*HEAD, *(entry.row() for entry in entries)))


def _mean(series: Sequence[metrics.Points]) -> metrics.Points:
    """Of the iterations that all have."""
    by_step = [dict(points) for points in series]
    common = set.intersection(*(set(points) for points in by_step))
    return [(step, mean(points[step] for points in by_step)) for step in sorted(common)]
