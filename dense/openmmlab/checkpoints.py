"""MMEngine's checkpoints: read without running what is in them, and the newest whole one found."""

import re
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.logging import HistoryBuffer, print_log
from mmengine.registry import Registry
from numpy.core import multiarray
from torch import Tensor, nn

from backbones import CheckpointError, LoadReport

_STATISTICS = ("min", "max", "mean", "current")


@contextmanager
def safe_reading() -> Iterator[None]:
    """Let ``torch.load(weights_only=True)`` read the log buffers beside MMEngine's weights.

    Those pickle their own methods by ``getattr``, which stays forbidden for anything else: with the
    real one a file could reach any function. Outside of the context nothing is allowed.
    """
    with torch.serialization.safe_globals(_allowed()):
        yield


def read(path: str | Path) -> dict[str, Any]:
    """The content of a checkpoint of MMEngine, on the CPU.

    Raises:
        CheckpointError: no such file, or a truncated one, or more in it than weights and logs.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise CheckpointError(f"no checkpoint at {path}")
    with refusing(path), safe_reading():
        return torch.load(path, map_location="cpu", weights_only=True)


@contextmanager
def refusing(source: str | Path) -> Iterator[None]:
    """Turn what goes wrong with a whole model's checkpoint into one line that names the file.

    Raises:
        CheckpointError: instead of anything that reading or loading raises.
    """
    try:
        yield
    except Exception as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        reason = "; ".join(lines[:4]) or type(error).__name__
        reason = reason if len(reason) < 500 else f"{reason[:500]} ..."
        raise CheckpointError(
            f"{source} is not a checkpoint of this model: {reason} "
            "(weights for the backbone alone go into its init)"
        ) from error


def metainfo(content: dict, dataset: dict, datasets: Registry, needed: Sequence[str]) -> dict:
    """What a checkpoint says of its data set, or the config's data set where it lacks something.

    Args:
        content: of the checkpoint; before MMEngine, OpenMMLab wrote the keys in capitals.
        dataset: the config's.
        datasets: where its type is registered.
        needed: keys such as ``"classes"``.
    """
    meta = content.get("meta", {})
    meta = {key.lower(): value for key, value in meta.get("dataset_meta", meta).items()}
    if all(meta.get(key) for key in needed):
        return meta
    return dataset.get("metainfo") or datasets.get(dataset["type"]).METAINFO


def load_whole(
    model: nn.Module, state_dict: Mapping[str, Tensor], source: str | Path
) -> LoadReport:
    """Load a whole detector or segmentor, the released files of older OpenMMLab versions too.

    Returns:
        What matched; it is logged.

    Raises:
        CheckpointError: anything but a full match.
    """
    with refusing(source):
        result = model.load_state_dict(state_dict, strict=False)
    counters = "num_batches_tracked"
    missing = [name for name in result.missing_keys if not name.endswith(counters)]
    absent = set(result.missing_keys)
    report = LoadReport(
        source=str(source),
        matched=tuple(name for name in model.state_dict() if name not in absent),
        missing=tuple(missing),
        unexpected=tuple(result.unexpected_keys),
        resized=(),
    )
    if report.missing or report.unexpected:
        raise CheckpointError(f"not a checkpoint of this whole model: {report}")
    print_log(str(report), logger="current")
    return report


def newest_whole(work_dir: str | Path) -> tuple[Path | None, list[Path]]:
    """The last checkpoint of a work folder to which writing was finished.

    Args:
        work_dir: where ``iter_<n>.pth`` or ``epoch_<n>.pth`` lie; it need not exist.

    Returns:
        The checkpoint, None if there is none, and the newer ones that are damaged, newest first.
    """
    numbered = []
    for path in Path(work_dir).glob("*.pth"):
        if match := re.fullmatch(r"(?:iter|epoch)_(\d+)\.pth", path.name):
            numbered.append((int(match[1]), path))
    damaged = []
    for _, path in sorted(numbered, reverse=True):
        if _is_whole(path):
            return path, damaged
        damaged.append(path)
    return None, damaged


def _is_whole(path: Path) -> bool:
    # PyTorch's files are zip archives, with a checksum of every tensor.
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
    """A ``getattr`` that knows the log buffer's statistics and nothing else."""
    if owner is not HistoryBuffer or name not in _STATISTICS:
        raise CheckpointError(f"it asks for {name!r} of {owner!r}, which no log buffer needs")
    return getattr(owner, name)
