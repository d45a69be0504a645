"""The ``native`` backend: C kernels, called by ctypes.

They are those of the installed package; if it has none that run here, they are compiled on first
use. Without a C compiler operators use another backend; so they do if the compiler fails, with one
warning. :mod:`backbones.ops.library` compiles and caches.
"""

import ctypes
import os
import subprocess
import warnings
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from backbones.ops import library

_TYPES = {torch.float32: "float", torch.float64: "double"}


@torch.compiler.assume_constant_result
def missing() -> str | None:
    """Why the C kernels cannot be used, None if they can; the first call compiles them."""
    return _build()[1]


@torch.compiler.assume_constant_result
def origin() -> str | None:
    """Where the C kernels are from, None if they cannot be used; the first call compiles them."""
    libraries, reason = _build()
    if reason is not None:
        return None
    file = Path(libraries[torch.float32]._name)
    if file == library.packaged("float"):
        return f"from the package: {file.name}"
    return f"compiled on this machine: {file}"


def call(name: str, *arguments: Tensor | int | None) -> None:
    """Call a function of the C sources.

    Args:
        name: the function.
        arguments: its arguments except the last, the number of threads; None is a null pointer.

    Raises:
        ValueError: a tensor is not contiguous, not on the CPU, or of another dtype than the first.
        MemoryError: the function could not allocate its work space.
    """
    tensors = [a for a in arguments if isinstance(a, Tensor)]
    dtype = tensors[0].dtype
    for tensor in tensors:
        if not tensor.is_contiguous() or tensor.dtype != dtype or tensor.device.type != "cpu":
            raise ValueError(
                f"native {name} takes contiguous CPU tensors of one dtype, {dtype}: got "
                f"{tensor.dtype} on {tensor.device} with strides {tensor.stride()}"
            )
    values = [
        ctypes.c_void_p(a.data_ptr() if isinstance(a, Tensor) else None)
        if isinstance(a, Tensor | None)
        else ctypes.c_int64(a)
        for a in arguments
    ]
    if getattr(_build()[0][dtype], name)(*values, ctypes.c_int64(torch.get_num_threads())):
        raise MemoryError(f"native {name}: out of memory")


@cache
def _build() -> tuple[dict[torch.dtype, ctypes.CDLL], str | None]:
    """The library of each dtype, and why there is none (None if there is)."""
    packaged = {dtype: library.packaged(real) for dtype, real in _TYPES.items()}
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
        return {dtype: library.load(compiler, real) for dtype, real in _TYPES.items()}, None
    except library.MissingCompiler as error:
        return {}, str(error)
    except (OSError, subprocess.SubprocessError) as error:
        said = getattr(error, "stderr", None) or str(error)
        lines = said.strip().splitlines() or [type(error).__name__]
        said = next((line for line in lines if "error" in line.lower()), lines[-1])
        reason = f"{' '.join(compiler)} could not build the C kernels: {said.strip()}"
        warnings.warn(f"{reason}; slower backends take over", RuntimeWarning, stacklevel=2)
        return {}, reason
