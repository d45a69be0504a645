"""The ``native`` backend: C kernels, called by ctypes.

They are those of the installed package; if it has none that run here, they are compiled on first
use. Without a C compiler operators use another backend; so they do if the compiler fails, with one
warning. :mod:`backbones.ops.library` compiles and caches.
"""

import ctypes
import os
import subprocess
import warnings
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from backbones.ops import library

_TYPES = {
    torch.float32: "float",
    torch.float64: "double",
    torch.bfloat16: "bfloat16",
    torch.float16: "float16",
}
_WIDE = (torch.float32, torch.float64)


@torch.compiler.assume_constant_result
def missing() -> str | None:
    """Why the C kernels cannot be used, None if they can; the first call compiles them."""
    return _build(*_WIDE)[1]


@torch.compiler.assume_constant_result
def origin() -> str | None:
    """Where the C kernels are from, None if they cannot be used; the first call compiles them."""
    libraries, reason = _build(*_WIDE)
    if reason is not None:
        return None
    file = Path(libraries[torch.float32]._name)
    if file == library.packaged("float"):
        return f"from the package: {file.name}"
    return f"compiled on this machine: {file}"


def maps(first: Tensor, *others: Tensor) -> Tensor | list[Tensor]:
    """Contiguous maps in a dtype that the C kernels read: that of ``first``, or float32.

    Returns:
        A tensor for a single argument, otherwise a list.
    """
    dtype = first.dtype
    if dtype not in _WIDE and _library(dtype) is None:
        dtype = torch.promote_types(dtype, torch.float32)
    tensors = [x.to(dtype).contiguous() for x in (first, *others)]
    return tensors if others else tensors[0]


def weights(dtype: torch.dtype, *tensors: Tensor) -> list[Tensor]:
    """Contiguous tensors in the dtype of sums over maps of ``dtype``."""
    return [x.to(sums(dtype)).contiguous() for x in tensors]


def sums(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which the C kernels add up what is in maps of ``dtype``."""
    return torch.promote_types(dtype, torch.float32)


def reads(dtype: torch.dtype) -> bool:
    """Whether there are C kernels for maps of ``dtype``; they may be compiled now."""
    return missing() is None and _library(dtype) is not None


def factor(dtype: torch.dtype) -> int:
    """How many numbers of ``dtype`` the processor multiplies and adds up as one: 1 or 2."""
    return _library(dtype).factor()


def call(
    name: str,
    maps: Sequence[Tensor],
    weights: Sequence[Tensor | None] = (),
    sizes: Sequence[int] = (),
) -> None:
    """Call a function of the C sources.

    Args:
        name: the function.
        maps: its maps.
        weights: its weights and sums; None is a null pointer.
        sizes: its sizes except the last, the number of threads.

    Raises:
        ValueError: a tensor is not contiguous or not on the CPU, a map has another dtype than the
            first, or a weight has not that of :func:`sums`.
        MemoryError: the function could not allocate its work space.
    """
    dtype = maps[0].dtype
    wanted = [(x, dtype) for x in maps]
    wanted += [(x, sums(dtype)) for x in weights if x is not None]
    for tensor, dtype_of in wanted:
        if not tensor.is_contiguous() or tensor.dtype != dtype_of or tensor.device.type != "cpu":
            raise ValueError(
                f"native {name} takes contiguous CPU tensors, here of {dtype_of}: got "
                f"{tensor.dtype} on {tensor.device} with strides {tensor.stride()}"
            )
    pointers = [ctypes.c_void_p(None if x is None else x.data_ptr()) for x in (*maps, *weights)]
    numbers = [ctypes.c_int64(size) for size in (*sizes, torch.get_num_threads())]
    if getattr(_library(dtype), name)(*pointers, *numbers):
        raise MemoryError(f"native {name}: out of memory")


def _library(dtype: torch.dtype) -> ctypes.CDLL | None:
    """The library whose maps are of ``dtype``, None if there is none, as for most dtypes."""
    if dtype in _WIDE:
        return _build(*_WIDE)[0][dtype]
    # Compiled when it is needed; many programs never do.
    if dtype not in _TYPES or not library.suits(_TYPES[dtype]):
        return None
    return _build(dtype)[0].get(dtype)


@cache
def _build(*dtypes: torch.dtype) -> tuple[dict[torch.dtype, ctypes.CDLL], str | None]:
    """The library of each dtype, and why there is none (None if there is)."""
    packaged = {dtype: library.packaged(_TYPES[dtype]) for dtype in dtypes}
    if None not in packaged.values():
        try:
            # Not every PyTorch shows its OpenMP to other libraries; RTLD_NOLOAD loads no second.
            ctypes.CDLL("libgomp.so.1", mode=os.RTLD_NOLOAD | ctypes.RTLD_GLOBAL)
            return {dtype: ctypes.CDLL(str(path)) for dtype, path in packaged.items()}, None
        except OSError as error:
            message = f"{error}; the packaged C kernels are left for ones compiled here"
            warnings.warn(message, RuntimeWarning, stacklevel=2)
    try:
        compiler = library.compiler()
        return {dtype: library.load(compiler, _TYPES[dtype]) for dtype in dtypes}, None
    except library.MissingCompiler as error:
        return {}, str(error)
    except (OSError, subprocess.SubprocessError) as error:
        said = getattr(error, "stderr", None) or str(error)
        lines = said.strip().splitlines() or [type(error).__name__]
        said = next((line for line in lines if "error" in line.lower()), lines[-1])
        reason = f"{' '.join(compiler)} could not build the C kernels: {said.strip()}"
        warnings.warn(f"{reason}; slower backends take over", RuntimeWarning, stacklevel=2)
        return {}, reason
