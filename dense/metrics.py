"""Read and plot the training logs of MMEngine and Detectron2."""

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from dense import files
from dense.waiting import waiting

_logger = logging.getLogger(__name__)

_RATES = ("lr", "base_lr")
_LOSSES = ("loss", "total_loss")
# Validation metrics that are plotted: pretraining, MMSegmentation, MMDetection, Detectron2.
_METRICS = (
    *("top1", "top5", "real", "mIoU", "mAcc", "aAcc"),
    *("coco/bbox_mAP", "coco/segm_mAP", "bbox/AP", "segm/AP", "bbox/AP50", "segm/AP50"),
)
Points = list[tuple[int, float]]


@dataclass
class Run:
    """The curves of one run; each is a list of (iteration, value), sorted by iteration.

    Attributes:
        name: name of the work folder.
        loss: total loss.
        rate: learning rate.
        metrics: accuracy, mIoU or AP, by the name in the log.
        epochs: epoch to the iteration under which its validation is stored, where the log counts
            epochs: the last iteration logged before the validation.
    """

    name: str
    loss: Points = field(default_factory=list)
    rate: Points = field(default_factory=list)
    metrics: dict[str, Points] = field(default_factory=dict)
    epochs: dict[int, int] = field(default_factory=dict)


def log_files(work_dir: str | Path) -> list[Path]:
    """The logs of a work folder, oldest first.

    Raises:
        ValueError: there are none.
    """
    work_dir = Path(work_dir)
    logs = sorted(work_dir.glob("*/vis_data/scalars.json")) or list(work_dir.glob("metrics.json"))
    if not logs:
        raise ValueError(
            f"{work_dir} has no log of a training: <time>/vis_data/scalars.json (MMEngine) or "
            "metrics.json (Detectron2)"
        )
    return logs


def read_run(work_dir: str | Path) -> Run:
    """Read the logs of a work folder; values logged after a resume replace earlier ones.

    Args:
        work_dir: has MMEngine's ``<time>/vis_data/scalars.json`` or Detectron2's ``metrics.json``.

    Raises:
        ValueError: the folder has no log, or the log has no losses and no metrics.
    """
    work_dir = Path(work_dir)
    logs = log_files(work_dir)
    loss: dict[int, float] = {}
    rate: dict[int, float] = {}
    metrics: dict[str, dict[int, float]] = {}
    epochs: dict[int, int] = {}
    step, by_epoch = 0, False
    for log in logs:
        for entry in files.json_lines(log):
            # The "step" of MMEngine's validation lines is the epoch if training lines have one:
            # such a validation is stored under the last training iteration.
            is_training = any(key in entry for key in _LOSSES)
            by_epoch = "epoch" in entry if is_training else by_epoch
            if is_training or not by_epoch:
                step = int(entry.get("iteration", entry.get("step", step)))
            elif "step" in entry:
                epochs[int(entry["step"])] = step
            for series, names in ((loss, _LOSSES), (rate, _RATES)):
                found = [entry[name] for name in names if isinstance(entry.get(name), int | float)]
                if found:
                    series[step] = float(found[0])
            for name in _METRICS:
                if isinstance(entry.get(name), int | float):
                    metrics.setdefault(name, {})[step] = float(entry[name])
    if not loss and not metrics:
        raise ValueError(f"{logs[0]} holds no losses and no metrics yet")
    return Run(
        work_dir.absolute().name,
        sorted(loss.items()),
        sorted(rate.items()),
        {name: sorted(points.items()) for name, points in metrics.items()},
        epochs,
    )


def evaluated(work_dir: str | Path, name: str, until: int) -> list[float]:
    """A metric of the evaluations that a work folder's log has.

    Args:
        work_dir: as :func:`read_run` takes it; one without a log has no evaluations.
        name: the metric's, such as ``"mIoU"``.
        until: iteration after which evaluations do not count.
    """
    try:
        points = read_run(work_dir).metrics.get(name, [])
    except ValueError:
        return []
    return [value for step, value in points if step <= until]


def since_best(values: Sequence[float]) -> int:
    """How many values follow the highest one; NaN is the lowest.

    >>> since_best([0.1, 0.3, 0.2, 0.3])
    2
    """
    numbers = [-math.inf if math.isnan(value) else value for value in values]
    return len(numbers) - 1 - numbers.index(max(numbers)) if numbers else 0


def plot(runs: Sequence[Run], path: str | Path) -> Path:
    """Plot loss, learning rate and validation metrics of several runs side by side.

    Args:
        runs: from :func:`read_run`.
        path: the ``.png`` or ``.svg`` to write, atomically.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(15, 4.2), layout="constrained")
    axes = figure.subplots(1, 3)
    lines = ("-", "--", ":", "-.")
    for number, run in enumerate(runs):
        colour = f"C{number}"
        axes[0].plot(*_columns(run.loss), color=colour, label=run.name, linewidth=1)
        axes[1].plot(*_columns(run.rate), color=colour, label=run.name)
        for (name, points), style in zip(run.metrics.items(), lines * 4, strict=False):
            label = f"{run.name}: {name}" if len(runs) > 1 else name
            axes[2].plot(*_columns(points), style, color=colour, label=label, marker=".")
    for axis, title in zip(axes, ("loss", "learning rate", "validation"), strict=True):
        axis.set(title=title, xlabel="iteration")
        axis.grid(alpha=0.3)
        if axis.lines:
            axis.legend(fontsize="small")
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    return files.write(
        path, lambda partial: figure.savefig(partial, format=path.suffix[1:], dpi=110)
    )


def plot_run(work_dir: str | Path) -> Path:
    """Plot one run as ``metrics.png`` in its work folder; raises what :func:`read_run` raises."""
    return plot([read_run(work_dir)], Path(work_dir, "metrics.png"))


def plot_finished(work_dir: str | Path) -> None:
    """:func:`plot_run` after training: failures are logged and never raised."""
    try:
        with waiting(f"plotting {Path(work_dir, 'metrics.png')}"):
            plot_run(work_dir)
    except Exception as error:
        _logger.warning(f"no plot of {work_dir}: {error}")


def _columns(points: Points) -> tuple[list[int], list[float]]:
    return [step for step, _ in points], [value for _, value in points]
