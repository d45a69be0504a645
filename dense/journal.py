"""What a training is, in the first line of its log and in ``run.json`` beside its checkpoints.

>>> start = Start("CPU, 2 threads", "float32", 16, 118287, 270000, "random weights")
>>> begin("work_dirs/mine", start, "configs/mine.py")
>>> end("work_dirs/mine")
"""

import json
import logging
import os
import platform
import resource
import shlex
import sys
import time
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dense import files
from dense.report import versions

_logger = logging.getLogger(__name__)

FILE = "run.json"
# When the process's training began, by folder.
_BEGAN: dict[str, float] = {}


@dataclass(frozen=True)
class Start:
    """What a training starts with.

    Attributes:
        device: from :func:`device_name`.
        precision: ``"float32"``, ``"bfloat16"`` or ``"float16"``.
        batch: images of an optimizer step, over all processes.
        images: images of the training data; None if they have no number.
        steps: optimizer steps of the whole training.
        weights: from :func:`weights`, or where a resumed training goes on.
    """

    device: str
    precision: str
    batch: int
    images: int | None
    steps: int
    weights: str

    def __str__(self) -> str:
        images = " images"
        if self.images is not None:
            epochs = self.steps * self.batch / max(1, self.images)
            images = f" of {self.images} images ({epochs:.3g} epochs)"
        return (
            f"training on {self.device} in {self.precision}: {self.steps} steps of {self.batch}"
            f"{images}, {self.weights}"
        )


def device_name(device: str | torch.device, processes: int = 1) -> str:
    """The GPU's name, or how many threads a CPU process has; ``processes`` of them."""
    many = f"{processes} x " if processes > 1 else ""
    if torch.device(device).type == "cuda":
        return many + torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"{many}CPU, {threads} thread{'' if threads == 1 else 's'}"


def weights(model: nn.Module) -> str:
    """What ``init`` gave: the load reports that the model's networks kept, or random weights."""
    reports = [
        report
        for module in model.modules()
        if (report := getattr(module, "load_report", None)) is not None
    ]
    if not reports:
        return "random weights"
    return "; ".join(
        f"weights of {report.source}: {len(report.matched)} of "
        f"{len(report.matched) + len(report.missing)} entries"
        + (f", {len(report.resized)} resized" if report.resized else "")
        for report in reports
    )


def begin(folder: str | os.PathLike, start: Start, config: str | os.PathLike | None) -> None:
    """Enter a training, or its continuation, into the ``run.json`` of its folder.

    Args:
        folder: the work folder, which exists.
        start: what it starts with.
        config: the config that the command line names.
    """
    _BEGAN[str(folder)] = time.monotonic()
    entry = {
        "command": shlex.join(["python", *sys.argv]),
        "config": str(Path(config).absolute()) if config else None,
        "began": datetime.now().isoformat(timespec="seconds"),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "versions": {"python": platform.python_version(), **versions()},
        **asdict(start),
    }
    _try_to_write(folder, [*read(folder), entry])


def end(folder: str | os.PathLike) -> None:
    """Enter that the training that began in this process is finished: its time and memory."""
    parts = read(folder)
    if parts and str(folder) in _BEGAN:
        seconds = time.monotonic() - _BEGAN[str(folder)]
        parts[-1] |= {"seconds": round(seconds, 1), "peak_memory_mb": round(peak_memory())}
        _try_to_write(folder, parts)


def read(folder: str | os.PathLike) -> list[dict[str, Any]]:
    """The entries of a folder's ``run.json``, one for each start; empty without the file."""
    try:
        content = json.loads(Path(folder, FILE).read_text())
    except (OSError, ValueError):
        return []
    return content if isinstance(content, list) else []


def peak_memory() -> float:
    """The peak of this process in MB: of the GPU if one is used, else of main memory."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    # In bytes on macOS and in KB on Linux.
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


def _try_to_write(folder: str | os.PathLike, entries: list[dict[str, Any]]) -> None:
    """Write ``run.json``; no training ends because it cannot be written."""
    try:
        files.write(Path(folder, FILE), json.dumps(entries, indent=1))
    except OSError as error:
        _logger.warning(f"{FILE} is not written: {error}")
