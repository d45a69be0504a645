"""Weights out of a file or from behind a URL, and nothing but weights."""

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

# Where training scripts put the weights inside a checkpoint, EMA first. MMEngine writes the
# averaged ones under "state_dict" and the others under "ema_state_dict".
_WRAPPERS = ("state_dict_ema", "model_ema", "state_dict", "model", "module")
# What is found beside weights in files of MMEngine, of Swin's and of the authors' code: log buffers
# of numpy numbers, and the options that a script was run with.
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
# A dictionary, which PyTorch fills only where it is one of its own.
_DICTIONARIES = ("yacs.config.CfgNode", "mmcv.utils.config.ConfigDict", "addict.addict.Dict")
_ATTEMPTS = 3


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be read, or that does not fit the network."""


class _Damaged(CheckpointError):
    """A file that was not written, or not downloaded, to its end."""


class _Ignored:
    """Stands in for anything in a file that is no weight: takes any arguments, does nothing."""

    def __new__(cls, *args: object) -> "_Ignored":
        return super().__new__(cls)

    def __init__(self, *args: object):
        pass

    def __setstate__(self, state: object) -> None:
        pass


def read_checkpoint(source: str | Path, *, weights_only: bool = True) -> dict[str, Tensor]:
    """Read the weights in a file or behind a URL, on the CPU.

    Args:
        source: a ``.pth`` or ``.safetensors`` file, or a URL of one, which is kept in timm's cache.
        weights_only: False also unpickles files that need more, Detectron2's ``.pkl`` for one:
            that runs code that the file names, so only for files whose origin you trust.

    Raises:
        CheckpointError: no such file, or one that is damaged, holds no state dict or is not safe to
            unpickle.
    """
    return read_with_classes(source, weights_only=weights_only)[0]


def read_with_classes(
    source: str | Path, *, weights_only: bool = True
) -> tuple[dict[str, Tensor], tuple[str, ...] | None]:
    """As :func:`read_checkpoint`, and the names of the classes where the file has them."""
    content = read_content(source, weights_only=weights_only)
    return _unwrap(content, str(source)), class_names(content)


def read_content(source: str | Path, *, weights_only: bool = True) -> Any:
    """All that a file holds, what is neither weights nor plain values left empty.

    A safetensors file gives ``state_dict`` and, of its header, ``meta``.
    """
    path = fetch(str(source)) if is_url(source) else Path(source).expanduser()
    return _load(path, str(source), weights_only)


def is_url(source: str | Path) -> bool:
    """Whether a source is to be downloaded."""
    return re.match(r"https?://", str(source), re.IGNORECASE) is not None


def fetch(url: str) -> Path:
    """Download a file into timm's cache, if it is not there, and see that it came whole.

    A connection that breaks is tried again; what it left is removed.

    Raises:
        CheckpointError: the server cannot be reached, or never sent the file to its end.
    """
    # Files of one name at two addresses are two files.
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
                f"what arrived ({cached.stat().st_size} bytes, beginning with {begins!r}) is no "
                "whole checkpoint"
            )
            cached.unlink()
        _logger.warning(f"{url}: {reason} (attempt {attempt} of {_ATTEMPTS})")
    raise CheckpointError(
        f"{url} cannot be downloaded: {reason}; a copy from elsewhere works as {cached}, or by its "
        "path instead of the URL"
    )


def _is_whole(path: Path) -> bool:
    """Whether a download is a checkpoint to its end: archives and safetensors say where that is."""
    if _kind(path) == "archive":
        return zipfile.is_zipfile(path)
    try:
        _load(path, path.name, weights_only=True)
    except _Damaged:
        return False
    # Whole, and not safe to read.
    except CheckpointError:
        return True
    return True


def _kind(path: Path) -> str | None:
    """What a file is by how it begins, whatever it is called: PyTorch's archive or its older
    pickle, safetensors, or None of them."""
    with open(path, "rb") as file:
        begins = file.read(9)
    # The length of its header, which may begin like either of the others.
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
        if not weights_only:
            return _unpickle(path)
        if path.suffix == ".pkl":
            raise pickle.UnpicklingError("a pickle of objects, as every .pkl")
        stand_ins = [(_Ignored, name) for name in _NOT_WEIGHTS]
        stand_ins += [(OrderedDict, name) for name in _DICTIONARIES]
        with torch.serialization.safe_globals(stand_ins):
            return torch.load(path, map_location="cpu", weights_only=True)


@contextmanager
def _refusing(source: str) -> Iterator[None]:
    """One line, that names the file, for whatever a reader raises."""
    try:
        yield
    except pickle.UnpicklingError as error:
        text = str(error).strip()
        named = re.search(r"GLOBAL (\S+)", text) or re.search(r"Unpickler error: (.+)", text)
        if named is None and ("pickle" not in text or "truncated" in text):
            raise _Damaged(f"{source} cannot be read: {text.splitlines()[0]}") from error
        raise CheckpointError(
            f"{source} cannot be read as weights alone: it holds {_first(named, text)}. "
            "Reading it all the same runs code that the file names: if you trust where it is from, "
            "pass weights_only=False to backbones.load_checkpoint, or write its weights to a safe "
            "file by tools/convert_checkpoint.py --trust"
        ) from error
    except (OSError, EOFError, RuntimeError, ValueError, KeyError, SafetensorError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise _Damaged(f"{source} cannot be read: {reason}") from error


def _first(named: re.Match | None, text: str) -> str:
    return named[1] if named else text.splitlines()[0]


def _unpickle(path: Path) -> Any:
    if path.suffix != ".pkl":
        return torch.load(path, map_location="cpu", weights_only=False)
    with open(path, "rb") as file:
        return pickle.load(file, encoding="latin1")


def _unwrap(content: object, source: str) -> dict[str, Tensor]:
    # Some wrap twice.
    for _ in range(2):
        for key in _WRAPPERS:
            if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
                content = content[key]
                break
    found = type(content).__name__
    if isinstance(content, Mapping):
        weights = {k: _tensor(v) for k, v in content.items() if hasattr(v, "shape")}
        if weights and all(isinstance(name, str) for name in weights):
            return weights
        found = f"a mapping with {', '.join(map(repr, list(content)[:6])) or 'nothing'}"
    raise CheckpointError(
        f"{source} holds no state dict but {found}: it should be a mapping of names to tensors, "
        f"bare or under one of {', '.join(_WRAPPERS)}"
    )


def _tensor(value: Any) -> Tensor:
    # Detectron2's pickles hold arrays.
    return value if isinstance(value, Tensor) else torch.as_tensor(value)


def _parsed(metadata: Mapping[str, str]) -> dict[str, Any]:
    """A safetensors header: plain strings, or JSON."""
    parsed = {}
    for key, text in metadata.items():
        try:
            parsed[key] = json.loads(text)
        except json.JSONDecodeError:
            parsed[key] = text
    return parsed


def class_names(content: Any) -> tuple[str, ...] | None:
    """Class names as the three trainings, and MMSegmentation before 1.0, write them."""
    if not isinstance(content, Mapping):
        return None
    meta = content.get("meta") if isinstance(content.get("meta"), Mapping) else {}
    dataset = meta.get("dataset_meta") if isinstance(meta.get("dataset_meta"), Mapping) else {}
    for place, key in (
        (meta, "classes"),
        (dataset, "classes"),
        (meta, "CLASSES"),
        (content, "classes"),
    ):
        names = place.get(key)
        if isinstance(names, Sequence) and not isinstance(names, str) and names:
            return tuple(map(str, names))
    return None
