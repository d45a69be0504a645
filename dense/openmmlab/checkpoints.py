"""MMEngine's checkpoints: safe reading, full-match loading, the newest intact one."""

import contextlib
import os
import pickle
import re
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.config import Config
from mmengine.logging import HistoryBuffer, print_log
from mmengine.registry import Registry
from numpy.core import multiarray
from torch import nn

from backbones import CheckpointError, LoadReport
from backbones.reading import class_names, refuse_not_finite, why_unsafe

_NUMBERED = r"(?:iter|epoch)_(\d+)\.pth"
_STATISTICS = ("min", "max", "mean", "current")


@contextmanager
def safe_reading() -> Iterator[None]:
    """Let ``torch.load(weights_only=True)`` read the log buffers in MMEngine's checkpoints.

    Log buffers pickle references to their methods as ``getattr`` calls. A restricted ``getattr``
    resolves these only: the builtin would let a file reach any function. Whoever reads a refused
    file again without ``weights_only``, as onedl-mmengine does, is refused again.
    """
    with torch.serialization.safe_globals(_allowed()), _only_weights():
        yield


@contextmanager
def _only_weights() -> Iterator[None]:
    forced, opposite = "TORCH_FORCE_WEIGHTS_ONLY_LOAD", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"
    before = {name: os.environ.pop(name, None) for name in (forced, opposite)}
    os.environ[forced] = "1"
    try:
        yield
    finally:
        del os.environ[forced]
        os.environ.update({name: value for name, value in before.items() if value is not None})


def read(path: str | Path) -> dict[str, Any]:
    """Read an MMEngine checkpoint onto the CPU.

    Raises:
        CheckpointError: the file is missing, truncated, or holds more than weights and logs.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise CheckpointError(f"no checkpoint at {path}")
    with refusing(path), safe_reading():
        content = torch.load(path, map_location="cpu", weights_only=True)
    refuse_not_finite(content, path)
    return content


@contextmanager
def refusing(source: str | Path) -> Iterator[None]:
    """Convert any exception of reading or loading a full checkpoint to a CheckpointError.

    Raises:
        CheckpointError: one line that names ``source`` and the original reason.
    """
    try:
        yield
    except pickle.UnpicklingError as error:
        raise CheckpointError(why_unsafe(error, source)) from error
    except Exception as error:
        if isinstance(error, CheckpointError) and str(source) in str(error):
            raise
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        reason = "; ".join(lines[:4]) or type(error).__name__
        reason = reason if len(reason) < 500 else f"{reason[:500]} ..."
        raise CheckpointError(
            f"{source} is not a checkpoint of this model: {reason} "
            "(weights for the backbone alone go into its init)"
        ) from error


def metainfo(content: dict, dataset: dict, datasets: Registry, needed: Sequence[str]) -> dict:
    """The data set's metainfo from a checkpoint, or from the config if a needed key is missing.

    Args:
        content: the checkpoint; files older than MMEngine have upper-case keys.
        dataset: the data set's config.
        datasets: the registry that holds the data set's type.
        needed: required keys, such as ``"classes"``.
    """
    meta = content.get("meta", {})
    meta = {key.lower(): value for key, value in meta.get("dataset_meta", meta).items()}
    if all(meta.get(key) for key in needed):
        return meta
    return dataset.get("metainfo") or datasets.get(dataset["type"]).METAINFO


def load_whole(model: nn.Module, path: str | Path) -> tuple[dict[str, Any], LoadReport]:
    """Load a checkpoint of a full detector or segmentor; return its content and the logged report.

    Raises:
        CheckpointError: the file cannot be read, or a key is missing, unexpected or of another
            shape.
    """
    content = read(path)
    with refusing(path):
        result = model.load_state_dict(content["state_dict"], strict=False)
    absent = set(result.missing_keys)
    report = LoadReport(
        source=str(path),
        matched=tuple(name for name in model.state_dict() if name not in absent),
        missing=tuple(k for k in result.missing_keys if not k.endswith("num_batches_tracked")),
        unexpected=tuple(result.unexpected_keys),
        resized=(),
    )
    if report.missing or report.unexpected:
        raise CheckpointError(f"not a checkpoint of this whole model: {report}")
    print_log(str(report), logger="current")
    return content, report


def newest_whole(work_dir: str | Path) -> tuple[Path | None, list[Path]]:
    """The newest intact checkpoint in a work folder.

    >>> path, damaged = newest_whole("work_dirs/mine")

    Args:
        work_dir: folder with ``iter_<n>.pth`` or ``epoch_<n>.pth``; it need not exist.

    Returns:
        The checkpoint with the most iterations, by what the files themselves say, then by their
        names (None if there is none), and the damaged ones.
    """
    numbers = {
        path: int(match[1])
        for path in Path(work_dir).glob("*.pth")
        if (match := re.fullmatch(_NUMBERED, path.name))
    }
    ages = {path: (iteration(path), number) for path, number in numbers.items()}
    newest, damaged = None, []
    for path in sorted(ages, key=ages.get, reverse=True):
        # All of a file is read: of those older than the newest, only the ones that say nothing.
        if newest and ages[path][0] >= 0:
            continue
        if _is_whole(path):
            newest = newest or path
        else:
            damaged.append(path)
    return newest, damaged


def iteration(path: str | Path) -> int:
    """The number of iterations that a checkpoint has; -1 if it does not say so."""
    with contextlib.suppress(CheckpointError), safe_reading(), refusing(path):
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        return int(content["meta"]["iter"])
    return -1


def refuse_other(content: dict[str, Any], classes: Sequence[str] | None, source: str) -> None:
    """Refuse to resume a run of other classes, or of the same in another order.

    Raises:
        CheckpointError: the checkpoint names classes that differ from ``classes``.
    """
    trained = class_names(content)
    if trained and classes and trained != tuple(map(str, classes)):
        order = " in another order" if set(trained) == set(classes) else ""
        raise CheckpointError(
            f"{source} was trained on the classes {shown(trained)}; the data has "
            f"{shown(classes)}{order}: --resume needs the same"
        )


def shown(classes: Sequence[str]) -> str:
    """Class names for a message, ten at most."""
    rest = f", ... ({len(classes)})" if len(classes) > 10 else ""
    return ",".join(map(str, classes[:10])) + rest


def network_of(content: Any) -> str | None:
    """The name of the network that a checkpoint was trained with, from the config in it."""
    with contextlib.suppress(Exception):
        model = Config.fromstring(content["meta"]["cfg"], ".py").model
        return model.get("name") or model.backbone.type
    return None


def _is_whole(path: Path) -> bool:
    # PyTorch's files are zip archives with a checksum per tensor.
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.testzip() is None
    except (zipfile.BadZipFile, OSError, EOFError):
        return False


def _allowed() -> list:
    numpy_modules = ("numpy.core.multiarray", "numpy._core.multiarray")
    return [
        HistoryBuffer,
        (_statistic, "builtins.getattr"),
        np.ndarray,
        np.dtype,
        *(type(np.dtype(kind)) for kind in ("f8", "f4", "i8", "i4", "b1")),
        *((multiarray._reconstruct, f"{module}._reconstruct") for module in numpy_modules),
        *((multiarray.scalar, f"{module}.scalar") for module in numpy_modules),
    ]


def _statistic(owner: object, name: str) -> Any:
    """A ``getattr`` restricted to the statistics of a log buffer."""
    if owner is not HistoryBuffer or name not in _STATISTICS:
        raise CheckpointError(f"it refers to {name!r} of {owner!r}, which is not allowed")
    return getattr(owner, name)
