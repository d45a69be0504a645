"""Render training results as one self-contained HTML page."""

import base64
import contextlib
import io
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from jinja2 import Environment

from dense import files

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


def plot(curves: Curves, title: str) -> str:
    """Plot losses over iterations as an SVG element; values that are not finite are skipped."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure as Canvas

    canvas = Canvas(figsize=(6.4, 3.6), layout="constrained")
    axes = canvas.add_subplot()
    for name, points in curves.items():
        finite = [(step, value) for step, value in points if math.isfinite(value)]
        total = name in ("total_loss", "loss")
        axes.plot(*zip(*finite, strict=True), label=name, linewidth=2.2 if total else 1.1)
    axes.set(title=title, xlabel="iteration", ylabel="loss", ylim=(0, None))
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=7, ncols=2, frameon=False)
    buffer = io.StringIO()
    with rc_context({"svg.fonttype": "none"}):
        canvas.savefig(buffer, format="svg", metadata={"Date": None})
    svg = buffer.getvalue()
    return svg[svg.index("<svg") :]


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
) -> str:
    """Render the page as HTML; images and plots are embedded, all text is escaped.

    Args:
        title: heading and title of the page.
        introduction: a paragraph below the heading.
        figures: the table of results.
        plots: pairs of an SVG of :func:`plot` and its caption.
        rows: pictures side by side; all rows have the columns of the first.
        commands: in the order in which they were run.
        facts: versions and the like, name to value.
    """
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters["uri"] = _data_uri
    environment.filters["minutes"] = lambda s: f"{int(s) // 60}:{int(s) % 60:02d}"
    page = Path(__file__).with_name("report.html").read_text()
    return environment.from_string(page).render(
        title=title,
        introduction=introduction,
        figures=figures,
        plots=plots,
        columns=list(rows[0].pictures) if rows else [],
        rows=rows,
        commands=commands,
        total=sum(command.seconds for command in commands),
        facts=facts,
    )


def _data_uri(path: Path) -> str:
    kind = {".jpg": "jpeg", ".png": "png"}[path.suffix]
    return f"data:image/{kind};base64," + base64.b64encode(path.read_bytes()).decode("ascii")
