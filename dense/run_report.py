"""The report of a training, ``report.html`` in its work folder, at its end or at any time before.

>>> write("work_dirs/mine")
"""

import logging
import math
import os
import signal
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib import import_module
from pathlib import Path
from typing import Any

from dense import files, journal, metrics, page, recipes, report
from dense.drawing import Colours

_logger = logging.getLogger(__name__)

NAME = "report.html"
# How many of the best and of the worst images are shown, and how many are judged to find them.
SHOWN, JUDGED = 4, 64
# Modules with ``config_values(path)``, ``per_class(run)`` and ``judged(run, images)``.
_PROVIDERS = {
    "detection": "dense.detection.reporting",
    "segmentation": "dense.segmentation.reporting",
    "classification": "dense.pretraining.reporting",
}


@dataclass(frozen=True)
class Judged:
    """A validation image with its truth and its prediction.

    Attributes:
        name: the file's.
        score: of the prediction, 0 to 100.
        pictures: functions that draw ``(H, W, 3)`` uint8, by what they show.
    """

    name: str
    score: float
    pictures: Mapping[str, Any]


@dataclass(frozen=True)
class Verdict:
    """Validation images, judged one by one.

    Attributes:
        images: in any order.
        measure: what the score is.
        source: what predicted, or where the predictions lie.
        colours: of the classes, by name.
    """

    images: Sequence[Judged]
    measure: str
    source: str
    colours: Colours = field(default_factory=dict)


class ReportError(ValueError):
    """A folder holds no training that a report could be of; the message is one line."""


def write(
    run: str | os.PathLike, images: int = JUDGED, out: str | os.PathLike | None = None
) -> Path:
    """Write the report of a run, finished or not.

    What the run has not yet, such as a validation or a checkpoint, is said to be missing.

    Args:
        run: the work folder of one of the three trainings.
        images: validation images to judge, drawn at random; 0 leaves the pictures out.
        out: the page; None is ``report.html`` in the folder.

    Raises:
        ReportError: the folder holds no config and log of a training, or one of MMDetection.
    """
    run = Path(run)
    if not run.is_dir():
        raise ReportError(f"there is no folder {run}")
    try:
        config = recipes.config_in(run)
        framework = recipes.framework_of(config)
        logs = metrics.log_files(run)
    except ValueError as error:
        raise ReportError(str(error)) from error
    try:
        found = metrics.read_run(run)
    except ValueError as error:
        found = str(error)
    if framework not in _PROVIDERS:
        raise ReportError(f"{run} is a training of MMDetection, of which there is no report")
    provider = import_module(_PROVIDERS[framework])
    parts = journal.read(run)
    title, introduction = run.absolute().name, _introduction(config, parts, logs)
    sections = [
        page.Section("Result", _result(found)),
        page.Section("Curves", _curves(found, run, framework)),
        page.Section("Classes", _per_class(provider, run)),
        page.Section("Best and worst validation images", _verdict(provider, run, images)),
        page.Section("Time and memory", [page.Facts(_costs(logs, parts))]),
        page.Section("Config", _config(provider, config, parts)),
        page.Section("Environment", _environment(parts)),
    ]
    return files.write(out or run / NAME, page.render(title, introduction, sections))


def write_finished(run: str | os.PathLike) -> None:
    """:func:`write` after training: failures are logged and never raised; Ctrl-C ends it."""
    # While training, both signals meant a checkpoint.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    _logger.info(f"writing {Path(run, NAME)}")
    again = f"python tools/report.py {run} writes it"
    try:
        _logger.info(f"report: {write(run)}")
    except KeyboardInterrupt:
        _logger.warning(f"the report was stopped; {again}")
    except Exception as error:
        _logger.warning(f"no report of {run}: {type(error).__name__}: {error}; {again}")


def differences(base: Mapping[str, Any], values: Mapping[str, Any]) -> list[list[str]]:
    """Rows of key, value in the base, value here, for all dotted keys whose values differ.

    >>> differences({"train": {"lr": 0.1, "iters": 9}}, {"train": {"lr": 0.2}})
    [['train.iters', '9', '(removed)'], ['train.lr', '0.1', '0.2']]
    """
    before, after = _flat(base), _flat(values)
    rows = []
    for key in sorted(before | after):
        old, new = before.get(key, "-"), after.get(key, "(removed)")
        if old != new:
            rows.append([key, old, new])
    return rows


def _flat(node: Any, place: str = "") -> dict[str, str]:
    children = node
    if isinstance(node, list | tuple) and any(isinstance(part, Mapping) for part in node):
        children = {str(index): part for index, part in enumerate(node)}
    if not isinstance(children, Mapping) or not children:
        text = str(list(node) if isinstance(node, tuple) else node)
        return {place: text if len(text) < 200 else f"{text[:197]}..."}
    return {
        key: value
        for name, part in children.items()
        for key, value in _flat(part, f"{place}.{name}" if place else str(name)).items()
    }


def _introduction(config: Path, parts: list[dict], logs: list[Path]) -> str:
    if not parts:
        return f"A training of {config.name}."
    last = parts[-1]
    state = "finished" if "seconds" in last else "not finished, or stopped"
    starts = f", in {len(parts)} starts" if len(parts) > 1 else ""
    images = "" if last["images"] is None else f" of {last['images']:,}"
    return (
        f"{last['steps']:,} steps of {last['batch']}{images} images on "
        f"{last['device']} in {last['precision']}, {parts[0]['weights']}; begun "
        f"{parts[0]['began'].replace('T', ' at ')}{starts}, {state}."
    )


def _result(found: metrics.Run | str) -> list[page.Block]:
    if isinstance(found, str):
        return [page.Text(found)]
    rows = []
    for name, points in found.metrics.items():
        # Detectron2 logs NaN where nothing was detected.
        finite = [(step, value) for step, value in points if math.isfinite(value)]
        step, best = max(finite, key=lambda point: point[1], default=(None, None))
        last = points[-1][1] if math.isfinite(points[-1][1]) else None
        rows.append([name, last, points[-1][0], best, step])
    if not rows:
        return [page.Text("There is no validation yet.")]
    return [page.Table(["measure (%)", "last", "iteration", "best", "at iteration"], rows)]


def _curves(found: metrics.Run | str, run: Path, framework: str) -> list[page.Block]:
    if isinstance(found, str):
        return []
    if framework == "detection":
        losses = report.detectron2_losses(run / "metrics.json")
    else:
        losses = report.mmengine_losses(run)
    plots = [(page.plot(losses, "Losses"), "")] if losses else []
    if any(math.isfinite(value) for points in found.metrics.values() for _, value in points):
        plots.append((page.plot(found.metrics, "Validation", ylabel="%"), ""))
    if found.rate:
        plots.append((page.plot({"learning rate": found.rate}, "Learning rate", ylabel=""), ""))
    return [page.Plots(plots)]


def _per_class(provider: Any, run: Path) -> list[page.Block]:
    table = provider.per_class(run)
    return [table or page.Text("There is no evaluation by class yet.")]


def _verdict(provider: Any, run: Path, images: int) -> list[page.Block]:
    if not images:
        return []
    # A report of a run whose data was moved has everything but the pictures.
    try:
        verdict = provider.judged(run, images)
    except Exception as error:
        _logger.warning(f"no pictures: {error}")
        return [page.Text(f"No pictures: {' '.join(str(error).split())}")]
    if not verdict.images:
        return [page.Text("No pictures: no validation image has a truth to compare with.")]
    ranked = sorted(verdict.images, key=lambda image: image.score, reverse=True)
    best = ranked[: min(SHOWN, (len(ranked) + 1) // 2)]
    worst = [image for image in ranked[::-1][:SHOWN] if image not in best]
    blocks: list[page.Block] = [
        page.Text(
            f"Of {len(ranked)} validation images drawn at random, by {verdict.measure}; median "
            f"{statistics.median(image.score for image in ranked):.1f}. Predictions: "
            f"{verdict.source}."
        )
    ]
    if verdict.colours:
        blocks.append(page.Legend(verdict.colours))
    things = []
    for what, group in (("best", best), ("worst", worst)):
        for place, image in enumerate(group, 1):
            pictures = [
                page.Picture(draw(), f"{shown}, {image.name}", shown)
                for shown, draw in image.pictures.items()
            ]
            things.append((f"{what} {place}: {image.name}, {image.score:.1f}", pictures))
    if all(len(pictures) == 1 for _, pictures in things):
        singles = [
            replace(picture, caption=f"{title}. {picture.caption}") for title, [picture] in things
        ]
        return [*blocks, page.Pictures(singles)]
    return [*blocks, page.Compared(things)]


def _costs(logs: Sequence[Path], parts: Sequence[dict]) -> dict[str, Any]:
    lines = [line for log in logs for line in files.json_lines(log)]
    steps = [line for line in lines if "loss" in line or "total_loss" in line]

    def median(name: str) -> float | None:
        values = [line[name] for line in steps if isinstance(line.get(name), int | float)]
        return statistics.median(values) if values else None

    facts: dict[str, Any] = {}
    finished = [part for part in parts if "seconds" in part]
    if finished:
        facts["training, of the starts that came to an end"] = page.duration(
            sum(part["seconds"] for part in finished)
        )
    if seconds := median("time"):
        facts["seconds an iteration, median"] = float(f"{seconds:.3g}")
        if data := median("data_time"):
            facts["of these, waiting for data"] = f"{100 * data / seconds:.0f}%"
    if speed := median("images_per_second"):
        facts["images a second, median"] = float(f"{speed:.3g}")
    peaks = [line[key] for line in lines for key in ("memory", "memory_mb") if line.get(key)]
    peaks += [part["peak_memory_mb"] for part in finished]
    if peaks:
        facts["peak memory (MB)"] = round(max(peaks))
    return facts or {"time": "not logged yet"}


def _config(provider: Any, config: Path, parts: Sequence[dict]) -> list[page.Block]:
    base = next((Path(part["config"]) for part in parts if part.get("config")), None)
    blocks: list[page.Block] = []
    if base is None or not base.is_file() or base.samefile(config):
        blocks.append(page.Text("Which recipe it is based on is not recorded, or it was moved."))
    else:
        try:
            rows = differences(provider.config_values(base), provider.config_values(config))
        except Exception as error:
            blocks.append(page.Text(f"{base} cannot be read: {' '.join(str(error).split())}"))
        else:
            said = f"{len(rows)} values differ from {base.name}:" if rows else f"As {base.name}."
            blocks.append(page.Text(said))
            if rows:
                blocks.append(page.Table(["key", "there", "here"], rows, stacked=True))
    blocks.append(page.Code(f"The whole config, {config.name}:", config.read_text()))
    return blocks


def _environment(parts: Sequence[dict]) -> list[page.Block]:
    if not parts:
        return [page.Text("Not recorded; now there are:"), page.Facts(report.versions())]
    last = parts[-1]
    facts = {"device": last["device"], "machine": last["machine"], **last["versions"]}
    commands = [page.Code(f"Begun {part['began']}:", part["command"]) for part in parts]
    return [*commands, page.Facts(facts)]
