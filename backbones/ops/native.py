"""The ``native`` backend: C kernels, compiled on first use and called by ctypes.

The libraries are cached on disk for all processes. Without a C compiler operators use another
backend; so they do if the compiler fails, with one warning.
"""

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
import warnings
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

_SOURCES = tuple(
    Path(__file__).with_name(f"{name}.c") for name in ("depthwise", "inhomogeneous", "windows")
)
_HEADER = Path(__file__).with_name("matrix.h")
_FLAGS = ("-O3", "-march=native", "-fopenmp", "-shared", "-fPIC")
_TYPES = {torch.float32: "float", torch.float64: "double"}


@torch.compiler.assume_constant_result
def missing() -> str | None:
    """Why the C kernels cannot be used, None if they can; the first call compiles them."""
    return _build()[1]


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
    if getattr(_library(dtype), name)(*values, ctypes.c_int64(torch.get_num_threads())):
        raise MemoryError(f"native {name}: out of memory")


@cache
def _library(dtype: torch.dtype) -> ctypes.CDLL:
    return ctypes.CDLL(str(_build()[0] / f"{_TYPES[dtype]}.so"))


@cache
def _build() -> tuple[Path, str | None]:
    """The folder of the libraries, and why there is none (None if there is)."""
    compiler = shutil.which(os.environ.get("CC") or "cc")
    if compiler is None:
        return Path(), "no C compiler was found: neither cc nor one that CC names"
    if platform.system() != "Linux":
        return Path(), f"the C kernels are built on Linux only, not on {platform.system()}"
    try:
        folder = _folder(compiler)
        for name in _TYPES.values():
            if not (folder / f"{name}.so").exists():
                _compile(compiler, name, folder)
            ctypes.CDLL(str(folder / f"{name}.so"))
    except (OSError, subprocess.SubprocessError) as error:
        said = getattr(error, "stderr", None) or str(error)
        lines = said.strip().splitlines()
        said = next((line for line in lines if "error" in line.lower()), lines[-1])
        reason = f"{compiler} could not build the C kernels: {said.strip()}"
        warnings.warn(f"{reason}; slower backends take over", RuntimeWarning, stacklevel=2)
        return Path(), reason
    return folder, None


def _folder(compiler: str) -> Path:
    """The cache folder for these sources, this compiler and this processor."""
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True)
    cpu = Path("/proc/cpuinfo").read_text().splitlines()
    flags = next((line for line in cpu if line.startswith(("flags", "Features"))), "")
    sources = [path.read_text() for path in (*_SOURCES, _HEADER)]
    key = *sources, version.stdout, str(_FLAGS), flags
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "dense-backbones" / hashlib.sha256("\n".join(key).encode()).hexdigest()[:16]


def _compile(compiler: str, name: str, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        built = Path(scratch) / f"{name}.so"
        command = [compiler, *_FLAGS, f"-DREAL={name}", *_SOURCES, "-o", built, "-lm"]
        subprocess.run(command, capture_output=True, text=True, check=True, timeout=300)
        # Atomic: several processes may build at once.
        built.replace(folder / f"{name}.so")
