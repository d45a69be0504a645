"""Compare networks trained with one recipe over several seeds: size, time, accuracy, differences.

A finished run is a small JSON file. It counts as long as its recipe is the same and its network
computes the same: the file has a fingerprint of the network, numbers that follow from its initial
weights, outputs and gradients. A change to one network discards the runs of that network alone.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from math import isclose, sqrt
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import timm
import torch
import torch.nn.functional as F

from backbones import ops
from backbones.ablations import ABLATIONS
from dense import files, metrics
from dense.analysis import complexity

HEAD = (
    "| network | parameters | FLOPs | minutes a run | top-1, mean ± spread | difference |"
    " 95% interval | seeds | paper, ImageNet-1K |",
    "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
)
# Two-sided 95% quantiles of Student's t distribution for 1, 2, ... degrees of freedom.
_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)


@dataclass(frozen=True)
class Network:
    """A network to train.

    Attributes:
        name: its name in the table.
        model: the timm model.
        options: arguments of the model.
        baseline: name of the network that differences are taken to; itself for none.
    """

    name: str
    model: str
    options: Mapping[str, Any] = field(default_factory=dict)
    baseline: str = ""

    def build(self, num_classes: int, img_size: int) -> torch.nn.Module:
        """The timm model for square images."""
        return timm.create_model(
            self.model, num_classes=num_classes, img_size=img_size, **self.options
        )


@dataclass(frozen=True)
class Result:
    """One finished run.

    Attributes:
        network: name of the network.
        seed: seed of the run.
        recipe: all of the config that decides about the result, as text.
        fingerprint: see :func:`fingerprint`.
        parameters: number of parameters, classifier included.
        flops: multiply-adds for one image of the training size.
        minutes: wall time, start-up and validation included.
        top1: accuracy in percent by epoch, the last one last.
        loss: mean training loss of the last logged iterations.
    """

    network: str
    seed: int
    recipe: str
    fingerprint: tuple[float, ...]
    parameters: int
    flops: int
    minutes: float
    top1: tuple[tuple[int, float], ...]
    loss: float

    def is_of(self, recipe: str, marks: Sequence[float]) -> bool:
        """Whether a run of this recipe, by a network of this fingerprint, would give this."""
        return (
            self.recipe == recipe
            and len(self.fingerprint) == len(marks)
            and all(
                isclose(a, b, rel_tol=1e-6) for a, b in zip(self.fingerprint, marks, strict=True)
            )
        )

    def write(self, folder: Path) -> Path:
        """Write ``<network>_seed<seed>.json``."""
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{self.network}_seed{self.seed}.json"
        return files.write(path, json.dumps(asdict(self), indent=1) + "\n")

    @classmethod
    def read(cls, path: Path) -> "Result":
        """Read a result.

        Raises:
            ValueError: the file holds no result.
        """
        try:
            content = json.loads(path.read_text())
            content["fingerprint"] = tuple(map(float, content["fingerprint"]))
            content["top1"] = tuple((epoch, float(value)) for epoch, value in content["top1"])
            content["minutes"] = float(content["minutes"])
            if not content["top1"]:
                raise ValueError("top1 is empty")
            return cls(**content)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path} is no result of a comparison: {error}") from error


def fingerprint(network: Network, num_classes: int, img_size: int) -> tuple[float, ...]:
    """Numbers that change with anything that changes what a network learns.

    Initial weights from seed 0; loss and gradients of a batch of noise in training mode; the loss
    after a step of gradient descent, and that in evaluation mode. All in float64, with the
    operators' reference.
    """
    with torch.random.fork_rng(devices=[]), ops.force("reference"):
        torch.manual_seed(0)
        model = network.build(num_classes, img_size).double()
        x = torch.randn(2, 3, img_size, img_size, dtype=torch.float64)
        target = torch.arange(2) % num_classes
        marks = [_size(model.parameters())]
        loss = F.cross_entropy(model.train()(x), target)
        loss.backward()
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        marks += [loss.item(), _size(gradients)]
        largest = max(gradient.abs().max() for gradient in gradients)
        with torch.no_grad():
            for p in model.parameters():
                if p.grad is not None:
                    p -= 1e-3 / largest * p.grad
            for training in (True, False):
                marks.append(F.cross_entropy(model.train(training)(x), target).item())
    return tuple(float(f"{mark:.12g}") for mark in marks)


def _size(tensors: Iterable[torch.Tensor]) -> float:
    return sum(tensor.detach().abs().sum().item() for tensor in tensors)


def read_log(work_dir: Path) -> tuple[tuple[tuple[int, float], ...], float]:
    """Top-1 by epoch and the last training loss, from the log of a finished run.

    Raises:
        ValueError: there is no log, or it has no validation.
    """
    log = metrics.read_run(work_dir)
    if "top1" not in log.metrics:
        raise ValueError(f"{work_dir} has no validation in its log")
    epoch_of = {step: epoch for epoch, step in log.epochs.items()}
    top1 = tuple((epoch_of.get(step, step), value) for step, value in log.metrics["top1"])
    return top1, round(log.loss[-1][1], 4)


@dataclass(frozen=True)
class Entry:
    """The results of one network over several seeds, and their difference to its baseline's.

    Attributes:
        results: by seed.
        baseline: the baseline's of the same seeds; empty without one.
    """

    results: tuple[Result, ...]
    baseline: tuple[Result, ...] = ()

    @property
    def top1(self) -> list[float]:
        """Accuracy of each run after its last epoch, in percent."""
        return [result.top1[-1][1] for result in self.results]

    @property
    def differences(self) -> list[float]:
        """Accuracy of each run less that of the baseline's run with the same seed."""
        other = {result.seed: result.top1[-1][1] for result in self.baseline}
        pairs = zip(self.results, self.top1, strict=True)
        return [value - other[r.seed] for r, value in pairs if r.seed in other]

    @property
    def interval(self) -> tuple[float, float] | None:
        """The 95% interval of the mean difference, by Student's t; None for less than two pairs."""
        found = self.differences
        if len(found) < 2:
            return None
        t = _T[min(len(found) - 1, len(_T)) - 1]
        half = t * stdev(found) / sqrt(len(found))
        return mean(found) - half, mean(found) + half

    def row(self) -> str:
        """A row of the Markdown table, with the paper's top-1 of the network in tiny.

        The spread is the standard deviation over seeds.
        """
        spread = f" ± {stdev(self.top1):.1f}" if len(self.top1) > 1 else ""
        first, interval = self.results[0], self.interval
        paper = ABLATIONS[first.network].top1 if first.network in ABLATIONS else None
        cells = (
            f"`{first.network}`",
            f"{first.parameters / 1e6:.2f}M",
            f"{first.flops / 1e9:.3f}G",
            f"{mean(result.minutes for result in self.results):.1f}",
            f"{mean(self.top1):.1f}{spread}",
            f"{mean(self.differences):+.1f}" if self.differences else "-",
            f"{interval[0]:+.1f} to {interval[1]:+.1f}" if interval else "-",
            " ".join(f"{value:.1f}" for value in self.top1),
            f"{paper:.1f}" if paper else "-",
        )
        return f"| {' | '.join(cells)} |"


def entries(networks: Sequence[Network], results: Sequence[Result]) -> list[Entry]:
    """An entry for each network that has results, in order; each has its baseline's as well."""
    by_name = {
        network.name: tuple(
            sorted((r for r in results if r.network == network.name), key=lambda r: r.seed)
        )
        for network in networks
    }
    return [
        Entry(
            by_name[n.name],
            by_name.get(n.baseline, ()) if n.baseline != n.name else (),
        )
        for n in networks
        if by_name[n.name]
    ]


def table(compared: Sequence[Entry]) -> str:
    """All entries as a Markdown table."""
    return "\n".join((*HEAD, *(entry.row() for entry in compared)))


def plot(compared: Sequence[Entry], path: Path) -> Path:
    """Draw top-1 of every seed with the mean, and the differences with their intervals, as PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 1.2 + 0.28 * len(compared)), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    for y, entry in enumerate(compared):
        left.plot(entry.top1, [y] * len(entry.top1), "o", color="C0", alpha=0.5, markersize=4)
        left.plot(mean(entry.top1), y, "|", color="C0", markersize=12)
        if entry.differences:
            middle = mean(entry.differences)
            low, high = entry.interval or (middle, middle)
            right.plot([low, high], [y, y], color="C1")
            right.plot(middle, y, "o", color="C1", markersize=5)
    right.axvline(0, color="grey", linewidth=0.8)
    left.set_yticks(range(len(compared)), [e.results[0].network for e in compared])
    left.invert_yaxis()
    left.set_xlabel("top-1, % (each seed, mean)")
    right.set_xlabel("difference to its family with the same seed (95% interval)")
    for axis in (left, right):
        axis.grid(alpha=0.3)
    return files.write(path, lambda partial: figure.savefig(partial, format="png", dpi=110))


def result_of(
    network: Network,
    seed: int,
    recipe: str,
    marks: tuple[float, ...],
    work_dir: Path,
    seconds: float,
    num_classes: int,
    img_size: int,
) -> Result:
    """The result of a finished run from its log; raises what :func:`read_log` raises."""
    top1, loss = read_log(work_dir)
    model = network.build(num_classes, img_size)
    return Result(
        network.name,
        seed,
        recipe,
        marks,
        complexity.parameters(model),
        complexity.flops(model, (1, 3, img_size, img_size)),
        round(seconds / 60, 2),
        top1,
        loss,
    )
