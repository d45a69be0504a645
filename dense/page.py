"""The writer of pages: sections of text, tables, pictures and plots as one HTML file.

The file loads nothing from elsewhere, and escapes all text. A picture is embedded as a JPEG with a
longer side of at most :data:`THUMBNAIL` pixels, about 20 kB: fifty pictures are a page of 1.5 MB.

>>> classes = Section("Classes", [Table(["class", "photos"], [["cat", 12], ["dog", 7]])])
>>> files.write("pets.html", render("Pets", "What a training sees.", [classes]))
"""

import base64
import io
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, StrictUndefined
from PIL import Image

THUMBNAIL = 400
Curves = Mapping[str, Sequence[tuple[float, float]]]


@dataclass(frozen=True)
class Cell:
    """A cell of a table that is more than its text.

    Attributes:
        value: text, or a number.
        share: length of a bar behind the value, 0 to 1.
        kind: ``"good"``, ``"bad"`` or ``"small"``.
    """

    value: Any
    share: float | None = None
    kind: str = ""


@dataclass(frozen=True)
class Text:
    """A paragraph."""

    text: str
    template = "text"


@dataclass(frozen=True)
class Items:
    """A list of lines, such as of files."""

    lines: Sequence[str]
    template = "items"


@dataclass(frozen=True)
class Facts:
    """Names and values."""

    values: Mapping[str, Any]
    template = "facts"


@dataclass(frozen=True)
class Table:
    """A table with a head; columns whose values are all numbers are aligned to the right.

    Attributes:
        columns: names, one for each column.
        rows: cells by row; plain values or :class:`Cell`. None is an empty cell.
        stacked: in a narrow window, show the cells of a row below each other.
    """

    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]
    stacked: bool = False
    template = "table"

    @property
    def cells(self) -> list[list[Cell]]:
        """All cells as :class:`Cell`."""
        return [[c if isinstance(c, Cell) else Cell(c) for c in row] for row in self.rows]

    @property
    def numeric(self) -> list[bool]:
        """For each column, whether it holds numbers alone."""
        return [
            any(cell.value is not None for cell in column)
            and all(cell.value is None or _is_number(cell.value) for cell in column)
            for column in zip(*self.cells, strict=True)
        ]


@dataclass(frozen=True)
class Picture:
    """An image file, or ``(H, W, 3)`` uint8 RGB, with what it shows.

    Attributes:
        image: scaled down to :data:`THUMBNAIL` pixels.
        alt: what the picture shows, for readers who do not see it.
        caption: a line below it.
    """

    image: Path | np.ndarray
    alt: str
    caption: str = ""

    @property
    def thumbnail(self) -> tuple[str, int, int]:
        """The picture as a ``data:`` URI, its width and its height."""
        if isinstance(self.image, np.ndarray):
            picture = Image.fromarray(self.image)
        else:
            with Image.open(self.image) as opened:
                picture = opened.convert("RGB")
        picture.thumbnail((THUMBNAIL, THUMBNAIL), Image.Resampling.LANCZOS)
        buffer = io.BytesIO()
        picture.save(buffer, "JPEG", quality=82)
        uri = "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
        return uri, *picture.size


@dataclass(frozen=True)
class Pictures:
    """Pictures in rows as wide as the window, in reading order."""

    pictures: Sequence[Picture]
    template = "pictures"


@dataclass(frozen=True)
class Compared:
    """Pairs of a title and pictures beside each other, such as truth and prediction."""

    things: Sequence[tuple[str, Sequence[Picture]]]
    template = "compared"


@dataclass(frozen=True)
class Plots:
    """Pairs of an SVG of :func:`plot` and its caption."""

    plots: Sequence[tuple[str, str]]
    template = "plots"


@dataclass(frozen=True)
class Legend:
    """Class names and their colours, RGB from 0 to 255."""

    colours: Mapping[str, Sequence[int]]
    template = "legend"


@dataclass(frozen=True)
class Code:
    """Preformatted text, such as a command line, under a title."""

    title: str
    text: str
    template = "code"


Block = Text | Items | Facts | Table | Pictures | Compared | Plots | Legend | Code


@dataclass(frozen=True)
class Section:
    """A heading and what stands below it."""

    title: str
    blocks: Sequence[Block] = field(default_factory=list)


def render(title: str, introduction: str, sections: Iterable[Section]) -> str:
    """The page as HTML.

    Args:
        title: heading and title of the page.
        introduction: a paragraph below the heading.
        sections: in order; those without blocks are left out.
    """
    shown = [section for section in sections if section.blocks]
    return _template().render(title=title, introduction=introduction, sections=shown)


def plot(curves: Curves, title: str, xlabel: str = "iteration", ylabel: str = "loss") -> str:
    """Curves as an SVG element, in the page's text colour; values that are not finite are skipped.

    The curve ``loss`` or ``total_loss`` is drawn thicker.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.9, 3.3), layout="constrained")
    axes = figure.add_subplot()
    for name, points in curves.items():
        finite = [(step, value) for step, value in points if math.isfinite(value)]
        total = name in ("total_loss", "loss")
        marker = "o" if len(finite) < 20 else None
        axes.plot(
            *(zip(*finite, strict=True) if finite else ([], [])),
            label=name,
            linewidth=2.2 if total else 1.2,
            marker=marker,
            markersize=3,
        )
    axes.set(title=title, xlabel=xlabel, ylabel=ylabel)
    if all(value >= 0 for points in curves.values() for _, value in points):
        axes.set_ylim(bottom=0)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    if len(curves) > 1:
        figure.legend(fontsize=7, ncols=3, frameon=False, loc="outside lower center")
    return _svg(figure, rc_context)


def histogram(values: Mapping[str, Sequence[float]], title: str, xlabel: str) -> str:
    """Histograms of several named lists of numbers as an SVG element, logarithmic in x."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.9, 3.0), layout="constrained")
    axes = figure.add_subplot()
    positive = {name: [v for v in found if v > 0] for name, found in values.items()}
    every = [value for found in positive.values() for value in found]
    if every:
        low, high = min(every) * 0.95, max(every) * 1.05
        bins = np.geomspace(low, high, 24)
        for name, found in positive.items():
            axes.hist(found, bins, label=name, histtype="stepfilled", alpha=0.55)
        if high / low > 5:
            axes.set_xscale("log")
    axes.set(title=title, xlabel=xlabel, ylabel="number")
    axes.spines[["top", "right"]].set_visible(False)
    if len(positive) > 1:
        axes.legend(fontsize=7, framealpha=0.0)
    return _svg(figure, rc_context)


def _svg(figure: Any, rc_context: Any) -> str:
    buffer = io.StringIO()
    figure.patch.set_alpha(0)
    for axes in figure.axes:
        axes.patch.set_alpha(0)
    with rc_context({"svg.fonttype": "none"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    svg = buffer.getvalue()
    # Text, axes and ticks are black; the page's colour is another in a dark window.
    return svg[svg.index("<svg") :].replace("#000000", "currentColor")


def number(value: Any) -> str:
    """A number for a reader: thousands apart, at most two digits after the point.

    >>> number(118287), number(0.25), number(1e-4)
    ('118,287', '0.25', '0.0001')
    """
    if value is None:
        return ""
    if not _is_number(value):
        return str(value)
    if isinstance(value, int | np.integer):
        return f"{value:,}"
    if not math.isfinite(value):
        return "none" if math.isnan(value) else str(value)
    return f"{value:.3g}" if 0 < abs(value) < 0.1 else f"{value:,.2f}"


def duration(seconds: float) -> str:
    """Seconds as ``h:mm:ss``, or ``m:ss`` below an hour."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float | np.number) and not isinstance(value, bool)


@cache
def _template() -> Any:
    environment = Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined
    )
    environment.filters["number"] = number
    return environment.from_string(Path(__file__).with_name("page.html").read_text())
