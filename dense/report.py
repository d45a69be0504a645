"""The figures, losses and versions of trainings, and the demo's page of them."""

import contextlib
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from dense import files, page
from dense.drawing import Colours
from dense.page import plot as plot

Curves = dict[str, list[tuple[int, float]]]

PACKAGES = (
    *("torch", "torchvision", "timm", "mmengine", "mmcv", "mmcv-lite", "mmsegmentation"),
    *("detectron2", "sal-detectron2", "pycocotools", "numpy"),
)


@dataclass(frozen=True)
class Figure:
    """A measured value and its required minimum (or None), both in percent."""

    name: str
    value: float
    least: float | None
    source: str

    @property
    def missed(self) -> bool:
        return self.least is not None and not self.value >= self.least


@dataclass(frozen=True)
class Row:
    """One scene: its name, and the image file of each column."""

    name: str
    pictures: Mapping[str, Path]


@dataclass(frozen=True)
class Command:
    """A command line and its run time in seconds."""

    title: str
    line: str
    seconds: float


def detectron2_losses(metrics: str | os.PathLike) -> Curves:
    """The losses in Detectron2's ``metrics.json``; a resumed run's repeated iterations win."""
    return _losses(files.json_lines(metrics), "iteration")


def mmengine_losses(work_dir: str | os.PathLike) -> Curves:
    """The losses in the ``scalars.json`` of all runs in a work folder of mmengine.

    Raises:
        FileNotFoundError: the folder has no ``scalars.json``.
    """
    logs = sorted(Path(work_dir).glob("*/vis_data/scalars.json"))
    if not logs:
        raise FileNotFoundError(f"{work_dir} holds no vis_data/scalars.json")
    records = [record for path in logs for record in files.json_lines(path)]
    return _losses(records, "iter")


def mmengine_results(work_dir: str | os.PathLike) -> tuple[Path, dict]:
    """Path and content of the newest ``<timestamp>/<timestamp>.json`` of mmengine's test loop."""
    found = [p for p in Path(work_dir).glob("*/*.json") if p.stem == p.parent.name]
    if not found:
        raise FileNotFoundError(f"{work_dir} holds no <timestamp>/<timestamp>.json")
    newest = max(found)
    return newest, files.json_lines(newest)[-1]


def _losses(records: Iterable[dict], step_key: str) -> Curves:
    by_name: dict[str, dict[int, float]] = {}
    for record in records:
        for key, value in record.items():
            if step_key in record and "loss" in key and isinstance(value, int | float):
                by_name.setdefault(key, {})[int(record[step_key])] = float(value)
    return {name: sorted(points.items()) for name, points in by_name.items()}


def versions() -> dict[str, str]:
    """The versions of those of :data:`PACKAGES` that are installed."""
    found = {}
    for package in PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


def render(
    *,
    title: str,
    introduction: str,
    figures: Sequence[Figure],
    plots: Sequence[tuple[str, str]],
    rows: Sequence[Row],
    commands: Sequence[Command],
    facts: Mapping[str, str],
    legends: Mapping[str, Colours] | None = None,
) -> str:
    """Render the demo's page as HTML, by :func:`dense.page.render`.

    Args:
        title: heading and title of the page.
        introduction: a paragraph below the heading.
        figures: the table of results.
        plots: pairs of an SVG of :func:`plot` and its caption.
        rows: pictures side by side; all rows have the columns of the first.
        commands: in the order in which they were run.
        facts: versions and the like, name to value.
        legends: for each kind of pictures, the colours of its classes by name.
    """
    columns = list(rows[0].pictures) if rows else []
    results = [
        [
            figure.name,
            f"{figure.value:.1f}",
            ""
            if figure.least is None
            else page.Cell(
                f"{figure.least:.0f}: {'missed' if figure.missed else 'reached'}",
                kind="bad" if figure.missed else "good",
            ),
            page.Cell(figure.source, kind="small"),
        ]
        for figure in figures
    ]
    total = page.duration(sum(command.seconds for command in commands))
    return page.render(
        title,
        introduction,
        [
            page.Section(
                "Results on the held-out scenes",
                [page.Table(["figure", "result (%)", "at least", "from"], results)],
            ),
            page.Section("Losses", [page.Plots(plots)]),
            page.Section(
                "Prediction beside truth",
                [
                    page.Text("The first held-out scenes, not chosen by how well they went."),
                    *(
                        block
                        for name, colours in (legends or {}).items()
                        for block in (page.Text(f"{name.capitalize()}:"), page.Legend(colours))
                    ),
                    page.Compared(
                        [
                            (
                                row.name,
                                [
                                    page.Picture(row.pictures[name], f"{name}, {row.name}", name)
                                    for name in columns
                                ],
                            )
                            for row in rows
                        ]
                    ),
                ],
            ),
            page.Section(
                "Commands",
                [
                    page.Text(
                        "Run in this order from the root of the repository, "
                        f"{total} minutes in all:"
                    ),
                    *(
                        page.Code(
                            f"{command.title}, {page.duration(command.seconds)}", command.line
                        )
                        for command in commands
                    ),
                ],
            ),
            page.Section("Versions", [page.Facts(facts)]),
        ],
    )
