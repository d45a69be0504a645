"""Time several implementations in turns in one process, and measure their peak memory."""

import gc
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

Step = Callable[[], Any]


@dataclass(frozen=True)
class Contender:
    """One implementation.

    Attributes:
        name: name in the table.
        build: sets the implementation up and returns the step to be timed.
        ours: whether it is part of this package.
        in_torch: whether PyTorch allocates its memory; the peak of others is not seen.
        multiply_adds: of a step, to compare its speed with a plain product's; None if not counted.
    """

    name: str
    build: Callable[[], Step]
    ours: bool = False
    in_torch: bool = True
    multiply_adds: int | None = None


@dataclass(frozen=True)
class Contest:
    """Implementations of one computation, on one input.

    Attributes:
        suite: ``"operators"``, ``"networks"``, ``"scaling"`` or ``"models"``.
        title: computation and input size; unique within the suite.
        contenders: the first is the reference of the speed ratios.
        images: images in a step.
        pixels: pixels in a step.
    """

    suite: str
    title: str
    contenders: tuple[Contender, ...]
    images: int = 1
    pixels: int = 0

    @property
    def key(self) -> str:
        """Unique identifier."""
        return f"{self.suite}: {self.title}"


@dataclass(frozen=True)
class Result:
    """Measurements of one contender; None where it failed.

    Attributes:
        contest: the contest's key.
        name: the contender's name.
        ours: whether it is part of this package.
        seconds: median of the timed steps.
        low: first quartile.
        high: third quartile.
        rounds: number of timed steps.
        peak_bytes: peak memory of a step beyond what was allocated before it (weights, input).
        images: images in a step.
        pixels: pixels in a step.
        error: why it failed; empty if it did not.
        multiply_adds: of a step; None if not counted.
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
    error: str = ""
    multiply_adds: int | None = None

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
    """Run a contest: warm up and measure memory one by one, then time one step of each in turns.

    Every second round runs in reverse order, so that clock changes affect all contenders alike.

    Args:
        contest: the contenders.
        device: where they run.
        rounds: timed steps of each contender, at least 3.
        seconds: approximate limit of all timed rounds; at least 3 rounds are run.
        tick: called with a line about the progress.

    Returns:
        One result for each contender, in their order; a contender that raises has an ``error``.
    """
    steps: dict[str, Step] = {}
    peaks: dict[str, int] = {}
    errors: dict[str, str] = {}
    for contender in contest.contenders:
        tick(f"{contest.title}: {contender.name}")
        try:
            step = contender.build()
            step()
            if contender.in_torch:
                peaks[contender.name] = _peak(step, device)
            steps[contender.name] = step
        # An unsupported shape or a missing package becomes a row of the table.
        except Exception as error:
            reason = str(error).partition("\n")[0][:120]
            errors[contender.name] = f"{type(error).__name__}: {reason}"
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
    return [_result(contest, contender, times, peaks, errors) for contender in contest.contenders]


def _result(contest: Contest, contender: Contender, times, peaks, errors) -> Result:
    name = contender.name
    known = dict(
        images=contest.images, pixels=contest.pixels, multiply_adds=contender.multiply_adds
    )
    if name in errors:
        return Result(contest.key, name, contender.ours, **known, error=errors[name])
    low, median, high = statistics.quantiles(times[name], n=4, method="inclusive")
    measured = (median, low, high, len(times[name]), peaks.get(name))
    return Result(contest.key, name, contender.ours, *measured, **known)


def _time(step: Step, device: torch.device) -> float:
    _synchronize(device)
    started = time.perf_counter()
    step()
    _synchronize(device)
    return time.perf_counter() - started


def _peak(step: Step, device: torch.device) -> int:
    """Peak bytes of a step beyond those allocated before it."""
    _collect(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        step()
        _synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    # Only PyTorch's allocator is seen, not the scratch memory of libraries.
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
