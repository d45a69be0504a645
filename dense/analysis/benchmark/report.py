"""Benchmark results as Markdown tables and plots."""

import os
import platform
from collections.abc import Sequence
from pathlib import Path

import torch

from dense import files
from dense.analysis.benchmark.measure import Result

# The contender whose speed limits the others': one large matrix product.
PRODUCT = "a matrix product"


def machine(device: torch.device, dtype: torch.dtype) -> str:
    """Describe the machine: processor or GPU, threads, dtype, versions."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        name = f"{_processor()}, {torch.get_num_threads()} threads"
    numbers = "float32" if dtype == torch.float32 else "bfloat16 autocast"
    return (
        f"{name}, {numbers}; torch {torch.__version__}, Python {platform.python_version()}, "
        f"{platform.system()}"
    )


def markdown(results: Sequence[Result], where: str) -> str:
    """One table for each contest: time, quartiles, images/s, memory, speed ratio to the first.

    With :data:`PRODUCT` among the contenders, also the multiply-adds a second over the product's.
    """
    lines = [f"Machine: {where}.", ""]
    for contest in dict.fromkeys(result.contest for result in results):
        group = [result for result in results if result.contest == contest]
        reference = group[0]
        limit = next((_rate(r) for r in group if r.name == PRODUCT), None)
        header = ["", "ms (quartiles)", "images/s", "peak memory, MB"]
        header += [f"speed, {reference.name} = 1"]
        header += [] if limit is None else [f"of the speed of {PRODUCT}"]
        lines += [
            f"### {contest}",
            "",
            f"| {' | '.join(header)} |",
            f"|{' --- |' * len(header)}",
            *(_row(result, reference, limit) for result in group),
            "",
        ]
    return "\n".join(lines)


def plot_scaling(results: Sequence[Result], path: str | Path) -> None:
    """Plot time and memory per pixel against image size and batch size, as PNG."""
    from matplotlib.figure import Figure

    results = [r for r in results if r.contest.startswith("scaling") and r.seconds is not None]
    figure = Figure(figsize=(11, 7), layout="constrained")
    axes = figure.subplots(2, 2)
    for column, (label, chosen) in enumerate(
        (
            ("side of the image in pixels, batch 1", [r for r in results if r.images == 1]),
            ("images of 224x224 in a batch", [r for r in results if r.pixels == r.images * 224**2]),
        )
    ):
        for name in dict.fromkeys(r.name for r in chosen):
            mine = [r for r in chosen if r.name == name]
            x = [(r.pixels / r.images) ** 0.5 if column == 0 else r.images for r in mine]
            time = [1e9 * r.seconds / r.pixels for r in mine]
            memory = [r.peak_bytes / r.pixels for r in mine]
            axes[0][column].plot(x, time, marker="o", label=name)
            axes[1][column].plot(x, memory, marker="o", label=name)
        for row, quantity in enumerate(("ns per pixel", "peak bytes per pixel")):
            axes[row][column].set(xlabel=label, ylabel=quantity, xscale="log", ylim=(0, None))
            axes[row][column].grid(alpha=0.3)
            # Matplotlib's log scale would tick powers of ten only.
            ticks = sorted({x for line in axes[row][column].lines for x in line.get_xdata()})
            axes[row][column].set_xticks(ticks, [f"{tick:.0f}" for tick in ticks])
            axes[row][column].minorticks_off()
    axes[0][0].legend()
    files.write(path, lambda partial: figure.savefig(partial, format="png", dpi=110))


def _row(result: Result, reference: Result, limit: float | None) -> str:
    cells = [f"**{result.name}**" if result.ours else result.name]
    if result.seconds is None:
        cells += [result.error, "", "", ""]
    else:
        quartiles = f"{1e3 * result.low:.1f}-{1e3 * result.high:.1f}"
        cells += [f"{1e3 * result.seconds:.1f} ({quartiles})"]
        # A product of another size than the networks' processes no images.
        product = result.name == PRODUCT
        cells += ["" if product else f"{result.images / result.seconds:.2f}"]
        cells += ["" if result.peak_bytes is None else f"{result.peak_bytes / 2**20:.0f}"]
        ratio = reference.seconds and not product
        cells += [f"{reference.seconds / result.seconds:.2f}" if ratio else ""]
    if limit is not None:
        rate = _rate(result)
        cells += ["" if rate is None else f"{100 * rate / limit:.0f}%"]
    return f"| {' | '.join(cells)} |"


def _rate(result: Result) -> float | None:
    """Multiply-adds a second, None if they were not counted or the contender failed."""
    if result.multiply_adds is None or result.seconds is None:
        return None
    return result.multiply_adds / result.seconds


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return f"{platform.machine()} with {os.cpu_count()} cores"
