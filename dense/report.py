"""Render training results as one self-contained HTML page."""

import base64
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
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
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
    return environment.from_string(_PAGE).render(
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


_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ title }}</title>
<style>
  body { font: 16px/1.5 system-ui, sans-serif; color: #1c2430; background: #fff;
         max-width: 68rem; margin: 2rem auto; padding: 0 1rem; }
  h1 { font-size: 1.7rem; margin-bottom: .3rem; }
  h2 { font-size: 1.2rem; margin: 2.2rem 0 .6rem; }
  table { border-collapse: collapse; }
  th, td { padding: .3rem .9rem .3rem 0; text-align: left; border-bottom: 1px solid #dde2e8; }
  td.number { text-align: right; font-variant-numeric: tabular-nums; }
  .reached { color: #14713d; } .missed { color: #b3261e; font-weight: 600; }
  .plots { display: flex; flex-wrap: wrap; gap: 1rem; }
  .plots > div { flex: 1 1 26rem; } .plots svg { width: 100%; height: auto; }
  .scenes { width: 100%; } .scenes td, .scenes th { border: 0; padding: .15rem; }
  .scenes img { width: 100%; display: block; }
  pre { background: #f4f6f8; padding: .7rem .9rem; overflow-x: auto; font-size: .82rem;
        white-space: pre-wrap; overflow-wrap: anywhere; margin: .3rem 0 1rem; }
  small { color: #5a6675; }
</style>
</head>
<body>
<h1>{{ title }}</h1>
<p>{{ introduction }}</p>

<h2>Results on the held-out scenes</h2>
<table>
<tr><th>figure</th><th>result (%)</th><th>at least</th><th>from</th></tr>
{% for figure in figures %}
<tr><td>{{ figure.name }}</td>
<td class="number">{{ "%.1f" | format(figure.value) }}</td>
<td class="{{ "missed" if figure.missed else "reached" }}">
{% if figure.least is not none %}
{{ "%.0f" | format(figure.least) }}: {{ "missed" if figure.missed else "reached" }}
{% endif %}
</td>
<td><small>{{ figure.source }}</small></td></tr>
{% endfor %}
</table>

<h2>Losses</h2>
<div class="plots">
{% for svg, caption in plots %}
<div>{{ svg | safe }}<small>{{ caption }}</small></div>
{% endfor %}
</div>

<h2>Prediction beside truth</h2>
<p><small>The first held-out scenes, not chosen by how well they went.</small></p>
<table class="scenes">
<tr>{% for column in columns %}<th>{{ column }}</th>{% endfor %}</tr>
{% for row in rows %}
<tr>{% for column in columns %}
<td><img alt="{{ column }}, {{ row.name }}" src="{{ row.pictures[column] | uri }}"></td>
{% endfor %}</tr>
{% endfor %}
</table>

<h2>Commands</h2>
<p>Run in this order from the root of the repository, {{ total | minutes }} minutes in all:</p>
{% for command in commands %}
<div>{{ command.title }}, {{ command.seconds | minutes }}</div>
<pre>{{ command.line }}</pre>
{% endfor %}

<h2>Versions</h2>
<table>
{% for name, value in facts.items() %}
<tr><td>{{ name }}</td><td>{{ value }}</td></tr>
{% endfor %}
</table>
</body>
</html>
"""
