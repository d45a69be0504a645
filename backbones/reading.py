"""Read state dicts from files and URLs, by default without unpickling code."""

import json
import logging
import pickle
import re
import zipfile
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.error import URLError
from urllib.parse import urlparse

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

_logger = logging.getLogger(__name__)

# Keys of the weights in a training checkpoint, EMA weights first. MMEngine writes averaged weights
# under "state_dict" and the others under "ema_state_dict".
_WRAPPERS = ("state_dict_ema", "model_ema", "state_dict", "model", "module")
# Classes beside the weights in checkpoints of MMEngine, Swin and the authors' code: log buffers of
# numpy numbers, and command-line options. They are unpickled as _Ignored.
_NOT_WEIGHTS = (
    "mmengine.logging.history_buffer.HistoryBuffer",
    "builtins.getattr",
    "numpy.core.multiarray._reconstruct",
    "numpy.core.multiarray.scalar",
    "numpy._core.multiarray._reconstruct",
    "numpy._core.multiarray.scalar",
    "numpy.ndarray",
    "numpy.dtype",
    "numpy.dtypes.Float64DType",
    "numpy.dtypes.Float32DType",
    "numpy.dtypes.Int64DType",
    "argparse.Namespace",
)
# Unpickled as OrderedDict, because torch.load(weights_only=True) fills no other dict subclass.
_DICTIONARIES = ("yacs.config.CfgNode", "mmcv.utils.config.ConfigDict", "addict.addict.Dict")
_ATTEMPTS = 3


class CheckpointError(RuntimeError):
    """A checkpoint cannot be read, or does not fit the network."""


class _Damaged(CheckpointError):
    """A file is truncated or otherwise not a valid checkpoint."""


class _Ignored:
    """Replaces the objects of :data:`_NOT_WEIGHTS`: takes any arguments and does nothing."""

    def __new__(cls, *args: object) -> "_Ignored":
        return super().__new__(cls)

    def __init__(self, *args: object):
        pass

    def __setstate__(self, state: object) -> None:
        pass


def read_checkpoint(source: str | Path, *, weights_only: bool = True) -> dict[str, Tensor]:
    """Read the state dict of a checkpoint onto the CPU.

    >>> state_dict = backbones.read_checkpoint("pretrained.pth")

    Args:
        source: a ``.pth`` or ``.safetensors`` file, or a URL, cached in torch.hub's folder.
        weights_only: False also unpickles unsafe files, such as Detectron2's ``.pkl``. This can run
            code in the file: only for files that you trust.

    Raises:
        CheckpointError: the file does not exist, is damaged, holds no state dict, has NaN or
            infinite weights, or is unsafe to unpickle.
    """
    return read_with_classes(source, weights_only=weights_only)[0]


def read_with_classes(
    source: str | Path, *, weights_only: bool = True
) -> tuple[dict[str, Tensor], tuple[str, ...] | None]:
    """:func:`read_checkpoint`, and the file's class names or None."""
    content = read_content(source, weights_only=weights_only)
    weights = _unwrap(content, str(source))
    refuse_not_finite(weights, source)
    return weights, class_names(content)


def read_content(source: str | Path, *, weights_only: bool = True) -> Any:
    """Read all of a checkpoint; objects other than tensors and plain values come back empty.

    A safetensors file is returned as ``{"state_dict": weights, "meta": header}``.
    """
    path = fetch(str(source)) if is_url(source) else Path(source).expanduser()
    return _load(path, str(source), weights_only)


def is_url(source: str | Path) -> bool:
    """Whether ``source`` is an http or https URL."""
    return re.match(r"https?://", str(source), re.IGNORECASE) is not None


def fetch(url: str) -> Path:
    """Download a file into torch.hub's cache unless it is there, and check that it is complete.

    A failed or incomplete download is tried again, three times in all.

    Raises:
        CheckpointError: every attempt failed.
    """
    # The hash separates files of the same name at different addresses.
    name = f"{sha256(url.encode()).hexdigest()[:8]}_{PurePosixPath(urlparse(url).path).name}"
    cached = Path(torch.hub.get_dir(), "checkpoints", name)
    digest = torch.hub.HASH_REGEX.search(name)
    for attempt in range(1, _ATTEMPTS + 1):
        try:
            if not cached.exists():
                cached.parent.mkdir(parents=True, exist_ok=True)
                torch.hub.download_url_to_file(url, str(cached), digest and digest[1])
        except (URLError, OSError, RuntimeError) as error:
            reason = str(error)
        else:
            if _is_whole(cached):
                return cached
            with open(cached, "rb") as file:
                begins = file.read(16)
            reason = (
                f"the download ({cached.stat().st_size} bytes, beginning with {begins!r}) is no "
                "complete checkpoint"
            )
            cached.unlink()
        _logger.warning(f"{url}: {reason} (attempt {attempt} of {_ATTEMPTS})")
    raise CheckpointError(
        f"{url} cannot be downloaded: {reason}; save a copy as {cached}, or pass a file's path "
        "instead of the URL"
    )


def _is_whole(path: Path) -> bool:
    """Whether a download is a complete checkpoint."""
    if _kind(path) == "archive":
        return zipfile.is_zipfile(path)
    try:
        _load(path, path.name, weights_only=True)
    except _Damaged:
        return False
    except CheckpointError:  # complete, but unsafe to unpickle
        pass
    return True


def _kind(path: Path) -> str | None:
    """The format by the first bytes: ``"safetensors"``, ``"archive"``, ``"pickle"`` or None."""
    with open(path, "rb") as file:
        begins = file.read(9)
    # First: the eight bytes of the header's length may look like either of the others.
    if begins[8:] == b"{" and int.from_bytes(begins[:8], "little") < 100_000_000:
        return "safetensors"
    if begins.startswith(b"PK"):
        return "archive"
    return "pickle" if begins.startswith(b"\x80") else None


def _load(path: Path, source: str, weights_only: bool) -> Any:
    if not path.is_file():
        raise CheckpointError(f"no checkpoint at {source}: a file or a URL is needed")
    kind = _kind(path)
    with _refusing(source):
        if kind is None:
            with open(path, "rb") as file:
                raise ValueError(f"it is no checkpoint: it begins with {file.read(16)!r}")
        if kind == "safetensors":
            with safe_open(path, "pt") as file:
                weights = {name: file.get_tensor(name) for name in file.keys()}
                return {"state_dict": weights, "meta": _parsed(file.metadata() or {})}
        if path.suffix == ".pkl":
            if weights_only:
                raise pickle.UnpicklingError("a pickle of objects, as every .pkl")
            with open(path, "rb") as file:
                return pickle.load(file, encoding="latin1")
        stand_ins = [(_Ignored, name) for name in _NOT_WEIGHTS]
        stand_ins += [(OrderedDict, name) for name in _DICTIONARIES]
        with torch.serialization.safe_globals(stand_ins):
            return torch.load(path, map_location="cpu", weights_only=weights_only)


@contextmanager
def _refusing(source: str) -> Iterator[None]:
    """Turn a reader's exceptions into a one-line :class:`CheckpointError` that names the file."""
    try:
        yield
    except pickle.UnpicklingError as error:
        if _is_damage(error):
            reason = str(error).strip().splitlines()[0]
            raise _Damaged(f"{source} cannot be read: {reason}") from error
        raise CheckpointError(why_unsafe(error, source)) from error
    except (OSError, EOFError, RuntimeError, ValueError, KeyError, SafetensorError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise _Damaged(f"{source} cannot be read: {reason}") from error


def why_unsafe(error: pickle.UnpicklingError, source: str | Path) -> str:
    """One line on a file that ``torch.load(weights_only=True)`` refused."""
    if _is_damage(error):
        return f"{source} cannot be read: {str(error).strip().splitlines()[0]}"
    named = _global_in(error)
    held = named[1] if named else str(error).strip().splitlines()[0]
    return (
        f"{source} cannot be read as weights alone: it holds {held}. Unpickling it can run "
        "code in the file: if you trust its origin, pass weights_only=False to "
        "backbones.load_checkpoint, or write its weights to a safe file with "
        "tools/convert_checkpoint.py --trust"
    )


def _global_in(error: pickle.UnpicklingError) -> re.Match | None:
    text = str(error)
    return re.search(r"GLOBAL (\S+)", text) or re.search(r"Unpickler error:\s+(.+)", text)


def _is_damage(error: pickle.UnpicklingError) -> bool:
    text = str(error)
    return _global_in(error) is None and ("pickle" not in text or "truncated" in text)


def refuse_not_finite(content: Any, source: str | Path) -> None:
    """Refuse weights that are NaN or infinite.

    Args:
        content: a state dict, or a checkpoint that holds one under a usual key.
        source: names the file in the error message.

    Raises:
        CheckpointError: the message names the first such entry and how many there are.
    """
    for key in _WRAPPERS:
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    if not isinstance(content, Mapping):
        return
    bad = not_finite(content)
    if bad:
        raise CheckpointError(
            f"{source} is not used: {bad[0]} has NaN or infinite values"
            + (f", and so have {len(bad) - 1} other entries" if len(bad) > 1 else "")
            + "; a checkpoint from before the training diverged is needed"
        )


def not_finite(state_dict: Mapping[str, Any]) -> list[str]:
    """Names of the tensors of floating-point numbers that hold a NaN or an infinity."""
    return [
        name
        for name, value in state_dict.items()
        if isinstance(value, Tensor)
        and value.is_floating_point()
        and not bool(torch.isfinite(value).all())
    ]


def _unwrap(content: object, source: str) -> dict[str, Tensor]:
    # Some checkpoints are nested, such as {"model": {"state_dict": ...}}.
    for _ in range(2):
        for key in _WRAPPERS:
            if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
                content = content[key]
                break
    found = type(content).__name__
    if isinstance(content, Mapping):
        # Detectron2's pickles hold numpy arrays.
        weights = {
            k: v if isinstance(v, Tensor) else torch.as_tensor(v)
            for k, v in content.items()
            if hasattr(v, "shape")
        }
        if weights and all(isinstance(name, str) for name in weights):
            return weights
        found = f"a mapping with {', '.join(map(repr, list(content)[:6])) or 'nothing'}"
    raise CheckpointError(
        f"{source} holds no state dict but {found}: it should be a mapping of names to tensors, "
        f"bare or under one of {', '.join(_WRAPPERS)}"
    )


def _parsed(metadata: Mapping[str, str]) -> dict[str, Any]:
    """Parse the values of a safetensors header that are JSON; keep the others as strings."""
    parsed = {}
    for key, text in metadata.items():
        try:
            parsed[key] = json.loads(text)
        except json.JSONDecodeError:
            parsed[key] = text
    return parsed


def class_names(content: Any) -> tuple[str, ...] | None:
    """The class names in a checkpoint, from ``meta`` or the top level; None if there are none.

    The keys are those of this project's trainings, MMEngine and MMSegmentation before 1.0.
    """
    if not isinstance(content, Mapping):
        return None
    meta = content.get("meta") if isinstance(content.get("meta"), Mapping) else {}
    dataset = meta.get("dataset_meta") if isinstance(meta.get("dataset_meta"), Mapping) else {}
    found = [place.get("classes") for place in (meta, dataset, content)]
    for names in (*found, meta.get("CLASSES")):
        if isinstance(names, Sequence) and not isinstance(names, str) and names:
            return tuple(map(str, names))
    return None
