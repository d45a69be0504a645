"""Several implementations of one thing timed in turns, in one process, with their memory."""

import gc
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

Step = Callable[[], Any]


@dataclass(frozen=True)
class Contender:
    """One implementation.

    Attributes:
        name: what the table calls it.
        build: sets it up and returns what is timed.
        ours: whether it is of this package.
    """

    name: str
    build: Callable[[], Step]
    ours: bool = False


@dataclass(frozen=True)
class Contest:
    """Implementations of one thing, on one input.

    Attributes:
        suite: the table it belongs to.
        title: what is done, on what.
        contenders: the first is what the others are compared with.
        images: images in a step, for images per second.
        pixels: pixels in a step.
    """

    suite: str
    title: str
    contenders: tuple[Contender, ...]
    images: int = 1
    pixels: int = 0

    @property
    def key(self) -> str:
        """What tells it from every other one."""
        return f"{self.suite}: {self.title}"


@dataclass(frozen=True)
class Result:
    """What was measured of one contender.

    Attributes:
        contest: the contest's key.
        name: the contender's.
        ours: whether it is of this package.
        seconds: median of the timed steps; None where it could not be run.
        low: their first quartile.
        high: their third quartile.
        rounds: how many steps were timed.
        peak_bytes: most memory that a step held beside the network's weights and its input; None
            where it could not be run.
        images: images in a step.
        pixels: pixels in a step.
        error: why it could not be run.
    """

    contest: str
    name: str
    ours: bool
    seconds: float | None = None
    low: float | None = None
    high: float | None = None
    rounds: int = 0
    peak_bytes: int | None = None
    images: int = 1
    pixels: int = 0
    error: str = field(default="")

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


def hold(
    contest: Contest,
    device: torch.device,
    rounds: int = 9,
    seconds: float = 60.0,
    tick: Callable[[str], None] = lambda text: None,
) -> list[Result]:
    """Run a contest: memory and warm-up one by one, then one step of each in turns.

    Turns, and the order reversed in every second round, let a machine that slows down or warms up
    slow all of them alike.

    Args:
        contest: who runs what.
        device: where.
        rounds: steps timed of each, at least 3.
        seconds: about how long the timed rounds may take in all; fewer rounds are run then, never
            fewer than 3.
        tick: called with a line on what is being done.

    Returns:
        One result a contender, in their order. One that raises has an ``error`` and no figures.
    """
    steps: dict[str, Step] = {}
    peaks: dict[str, int] = {}
    errors: dict[str, str] = {}
    for contender in contest.contenders:
        tick(f"{contest.title}: {contender.name}")
        try:
            step = contender.build()
            step()
            peaks[contender.name] = _peak(step, device)
            steps[contender.name] = step
        # A peer that cannot do a shape, or lacks a package, is a line in the table.
        except Exception as error:
            errors[contender.name] = f"{type(error).__name__}: {str(error).splitlines()[0][:120]}"
        _collect(device)
    times: dict[str, list[float]] = {name: [] for name in steps}
    started = time.perf_counter()
    for number in range(max(3, rounds)):
        tick(f"{contest.title}: round {number + 1}")
        order: Sequence[str] = list(steps) if number % 2 == 0 else list(steps)[::-1]
        for name in order:
            times[name].append(_time(steps[name], device))
        if number >= 2 and time.perf_counter() - started > seconds:
            break
    return [
        _result(contest, contender, times, peaks, errors.get(contender.name, ""))
        for contender in contest.contenders
    ]


def _result(contest: Contest, contender: Contender, times, peaks, error: str) -> Result:
    common = dict(
        contest=contest.key,
        name=contender.name,
        ours=contender.ours,
        images=contest.images,
        pixels=contest.pixels,
    )
    if error:
        return Result(**common, error=error)
    low, median, high = statistics.quantiles(times[contender.name], n=4, method="inclusive")
    return Result(
        **common,
        seconds=median,
        low=low,
        high=high,
        rounds=len(times[contender.name]),
        peak_bytes=peaks[contender.name],
    )


def _time(step: Step, device: torch.device) -> float:
    _synchronize(device)
    started = time.perf_counter()
    step()
    _synchronize(device)
    return time.perf_counter() - started


def _peak(step: Step, device: torch.device) -> int:
    """Most bytes a step holds beyond those held before it."""
    _collect(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        step()
        _synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    # What PyTorch's allocator gave out; a library's own scratch is not seen.
    with profile(
        activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True
    ) as profiler:
        step()
    held = peak = 0
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _collect(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
