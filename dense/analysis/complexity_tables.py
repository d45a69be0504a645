"""The READMEs' tables of parameters and FLOPs, beside the paper's.

A section is one README: that of ``backbones`` or of a folder of ``configs/``. Its tables stand
between two marker lines and are written by ``tools/complexity.py --write``.
"""

from collections.abc import Callable, Iterable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from backbones import MODEL_NAMES
from backbones.ablations import ABLATIONS
from dense import files
from dense.analysis import complexity, paper
from dense.analysis.complexity import Count

_SIZES = ("tiny", "small", "base", "large", "nano")
_per_cent = "{:.1f}%".format
_22K = "in22k"


class Column(NamedTuple):
    """A column: title, key of the rows' dicts, and format function."""

    title: str
    key: str
    show: Callable[[Any], str] = str


class Table(NamedTuple):
    """Title, columns, rows of unrounded values (parameters, multiply-adds), and notes below."""

    title: str
    columns: tuple[Column, ...]
    rows: list[dict[str, Any]]
    notes: tuple[str, ...] = ()

    def cells(self) -> list[list[str]]:
        """The formatted cells: ``-`` where the paper has no value, ``?`` where none was counted."""
        return [[_cell(row, column) for column in self.columns] for row in self.rows]

    def without_flops(self) -> "Table":
        """The table without its columns of FLOPs."""
        kept = tuple(column for column in self.columns if "flops" not in column.key)
        return self._replace(columns=kept)

    def markdown(self) -> str:
        lines = [self.title, "", _line(column.title for column in self.columns)]
        lines += [_line("---" for _ in self.columns), *map(_line, self.cells())]
        return "\n".join([*lines, *(["", *self.notes] if self.notes else [])])


class Section(NamedTuple):
    """A README, the package that its models need, our extra for it, and the tables' builder.

    ``tool`` stands in the marker lines: see :func:`markers`.
    """

    readme: str
    package: str
    extra: str
    build: Callable[..., list[Table]]
    tool: str = "complexity"


def installed() -> list[str]:
    """The names of the sections whose package is installed."""
    return [name for name, section in SECTIONS.items() if find_spec(section.package)]


def markers(tool: str) -> tuple[str, str]:
    """The lines before and after the tables that ``tools/<tool>.py --write`` writes.

    ``tool`` can have an argument after a space, such as ``"complexity ablations"``.
    """
    name, *arguments = tool.split()
    command = " ".join([f"tools/{name}.py", *arguments])
    return (
        f"<!-- Written by: python {command} --write -->",
        f"<!-- End of what {command} writes. -->",
    )


BEGIN, END = markers("complexity")


def block(tables: Iterable[Table], tool: str = "complexity") -> str:
    """The tables as Markdown, between the two marker lines."""
    begin, end = markers(tool)
    return "\n\n".join([begin, *(table.markdown() for table in tables), end])


def read_block(readme: Path, tool: str = "complexity") -> str:
    """The block in a README, marker lines included.

    Raises:
        ValueError: a marker line is missing.
    """
    first, last = markers(tool)
    text = readme.read_text()
    begin, end = text.find(first), text.find(last)
    if begin < 0 or end < begin:
        raise ValueError(
            f"{readme} has no lines {first!r} and {last!r} for the tables to go between"
        )
    return text[begin : end + len(last)]


def write_block(readme: Path, tables: Iterable[Table], tool: str = "complexity") -> bool:
    """Replace the block in a README; returns whether that changed it."""
    old, new = read_block(readme, tool), block(tables, tool)
    if old != new:
        files.write(readme, readme.read_text().replace(old, new))
    return old != new


# The sections


def _backbones(root: Path, with_flops: bool, track: Callable) -> list[Table]:
    rows = [
        dict(
            name=f"`{name}`",
            **_beside(complexity.classifier(name, with_flops=with_flops), paper.TABLE_2.get(name)),
            top1=getattr(paper.TABLE_2.get(name), "top1", None),
            top1_22k=getattr(paper.TABLE_10.get(name), "top1", None),
        )
        for name in track(sorted(MODEL_NAMES, key=lambda n: _SIZES.index(n.rsplit("_", 1)[1])))
    ]
    larger = [
        dict(
            name=f"`{name}`",
            window=f"{window}x{window}",
            **_beside(complexity.classifier(name, 384, window, with_flops), published),
            top1=published.top1,
        )
        for (name, window), published in track(paper.TABLE_14.items())
    ]
    name, top1 = Column("model", "name"), Column("paper's top-1", "top1", _per_cent)
    return [
        Table(
            "1000 classes, 224x224, beside Tables 2 and 10; accuracy is the paper's:",
            (name, *_beside_columns("Table 2", 2), top1, Column("from 22K", "top1_22k", _per_cent)),
            rows,
        ),
        Table(
            "384x384, beside Table 14:",
            (name, Column("window", "window"), *_beside_columns("Table 14", 2), top1),
            larger,
        ),
    ]


def _ablations(root: Path, with_flops: bool, track: Callable) -> list[Table]:
    rows = []
    for name, ablation in track(ABLATIONS.items()):
        model, arguments = ablation.name(), ablation.arguments()
        window = 7 if ablation.is_pyramid else None
        count = complexity.classifier(model, window_size=window, with_flops=with_flops, **arguments)
        keywords = [f'"{model}"', *(f"{key}={value!r}" for key, value in arguments.items())]
        rows.append(
            dict(
                name=f"`{name}`",
                table=ablation.table,
                row=ablation.row,
                model=f"`create_model({', '.join(keywords)})`",
                top1=ablation.top1,
                **_beside(count, ablation),
            )
        )
    columns = (
        Column("name", "name"),
        Column("table", "table"),
        Column("row", "row"),
        Column("timm", "model"),
        *_beside_columns("paper's", 2),
        Column("paper's top-1", "top1", _per_cent),
    )
    notes = [f"- `{name}`: {row.note}" for name, row in ABLATIONS.items() if row.note]
    return [Table("1000 classes, 224x224, tiny:", columns, rows, tuple(notes))]


def _detection(root: Path, with_flops: bool, track: Callable) -> list[Table]:
    rows, extra = [], {}
    for path, backbone, from_22k in track(_configs(root / "configs/detection")):
        count, more = complexity.detectron2_detector(path, with_flops)
        extra = extra or more
        row = _row(path, backbone, from_22k, sum(more.values(), count), "DETECTION")
        rows.append(dict(row, own_parameters=count.parameters, own_flops=count.flops))
    notes = [f"- {name}: {_described(count)}" for name, count in extra.items()]
    columns = (
        *_CONFIG_COLUMNS,
        Column("parameters", "own_parameters", _millions),
        Column("FLOPs", "own_flops", _billions(1)),
        *_beside_columns("paper's", 1, "with the paper's heads: "),
        *_AP_COLUMNS,
    )
    lead = "The paper's heads are MMDetection's, whose cascade has what Detectron2's has not:"
    return [Table(_DETECTION_TITLE, columns, rows, (lead, "", *notes))]


def _mmdetection(root: Path, with_flops: bool, track: Callable) -> list[Table]:
    rows = [
        _row(*config, complexity.mmdet_detector(config[0], with_flops), "DETECTION")
        for config in track(_configs(root / "configs/mmdetection"))
    ]
    columns = (*_CONFIG_COLUMNS, *_beside_columns("paper's", 1), *_AP_COLUMNS)
    return [Table(_DETECTION_TITLE, columns, rows)]


def _segmentation(root: Path, with_flops: bool, track: Callable) -> list[Table]:
    rows = [
        _row(*config, complexity.segmentor(config[0], with_flops), "SEGMENTATION")
        for config in track(_configs(root / "configs/segmentation"))
    ]
    columns = (*_CONFIG_COLUMNS, *_beside_columns("paper's", 1), Column("paper's mIoU", "miou"))
    return [Table("UPerNet, 512x2048, beside Tables 3 and 11:", columns, rows)]


SECTIONS = {
    "backbones": Section("backbones/README.md", "timm", "complexity", _backbones),
    "ablations": Section(
        "backbones/README.md", "timm", "complexity", _ablations, "complexity ablations"
    ),
    "detection": Section("configs/detection/README.md", "detectron2", "detection", _detection),
    "mmdetection": Section("configs/mmdetection/README.md", "mmdet", "mmdetection", _mmdetection),
    "segmentation": Section(
        "configs/segmentation/README.md", "mmseg", "segmentation", _segmentation
    ),
}


def _configs(folder: Path) -> list[tuple[Path, str, bool]]:
    """Path, backbone and ImageNet-22K pretraining of every config in a folder, in table order."""
    found = []
    for path in folder.glob("*.py"):
        backbone = max((name for name in MODEL_NAMES if name in path.stem), key=len)
        found.append((path, backbone, _22K in path.stem))

    def order(config: tuple[Path, str, bool]) -> tuple:
        _, backbone, from_22k = config
        size = _SIZES.index(backbone.rsplit("_", 1)[1])
        return size, MODEL_NAMES.index(backbone), from_22k

    return sorted(found, key=order)


def _row(path: Path, backbone: str, from_22k: bool, count: Count, task: str) -> dict[str, Any]:
    pretraining = "-" if "nano" in backbone else "ImageNet-22K" if from_22k else "ImageNet-1K"
    published = getattr(paper, f"TABLE_{11 if from_22k else 3}_{task}").get(backbone)
    kind = paper.Detector if task == "DETECTION" else paper.Segmentor
    return dict(
        name=f"[{backbone}]({path.name})",
        pretraining=pretraining,
        **_beside(count, published),
        **{key: getattr(published, key, None) for key in kind._fields[2:]},
    )


def _beside(count: Count, published: Any) -> dict[str, float | None]:
    """A count, the paper's, and the differences of parameters (in M) and FLOPs (as a ratio).

    Parameters are rounded as the paper prints them: to an int, or a float of one digit.
    """
    off = ratio = None
    if published and published.parameters is not None:
        digits = 1 if isinstance(published.parameters, float) else None
        off = round(round(count.parameters / 1e6, digits) - published.parameters, digits)
    if published and None not in (count.flops, published.flops):
        ratio = count.flops / 1e9 / published.flops - 1
    return dict(
        parameters=count.parameters,
        paper_parameters=published.parameters if published else None,
        parameters_off=off,
        flops=count.flops,
        paper_flops=published.flops if published else None,
        flops_off=ratio,
    )


# Format of the cells


def _millions(value: int) -> str:
    return f"{value / 1e6:.2f}M"


def _billions(digits: int) -> Callable[[int], str]:
    return lambda value: f"{value / 1e9:.{digits}f}G"


def _described(count: Count) -> str:
    flops = "" if count.flops is None else f", {_billions(1)(count.flops)} FLOPs"
    return f"{_millions(count.parameters)} parameters{flops}"


_DETECTION_TITLE = "Cascade Mask R-CNN, 1280x800, 1000 boxes, 100 masks, beside Tables 3 and 11:"
_CONFIG_COLUMNS = (Column("config", "name"), Column("pretraining", "pretraining"))
_AP_COLUMNS = (Column("paper's box AP", "box_ap"), Column("paper's mask AP", "mask_ap"))


def _beside_columns(table: str, digits: int, whose: str = "") -> tuple[Column, ...]:
    return (
        Column(f"{whose}parameters", "parameters", _millions),
        Column(table, "paper_parameters", "{}M".format),
        Column("difference", "parameters_off", "{:g}M".format),
        Column(f"{whose}FLOPs", "flops", _billions(digits)),
        Column(table, "paper_flops", "{}G".format),
        Column("difference", "flops_off", "{:+.1%}".format),
    )


def _cell(row: dict[str, Any], column: Column) -> str:
    value = row[column.key]
    if value is None:
        uncounted = column.key in ("flops", "own_flops", "flops_off") and row["flops"] is None
        return "?" if uncounted else "-"
    return value if isinstance(value, str) else column.show(value)


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def raw(tables: Iterable[Table]) -> Iterator[dict[str, Any]]:
    """The tables as dicts for JSON; numbers are not rounded."""
    for table in tables:
        yield dict(title=table.title, rows=table.rows, notes=list(table.notes))
