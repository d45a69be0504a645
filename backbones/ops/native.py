"""The C kernels: built by the machine's C compiler on first use, and called.

They are built once for all processes, and nothing at import. A machine without a compiler, or one
whose compiler fails, takes the other backends; a failure is said once.
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
    """Why there is no library here, in a few words; None where there is one (built if need be)."""
    return _build()[1]


def call(name: str, *arguments: Tensor | int | None) -> None:
    """Run a function of the C sources, all of whose tensors are contiguous and of one dtype.

    Args:
        name: the function.
        arguments: its own, but for the last, the number of threads.

    Raises:
        MemoryError: it had none to work in.
    """
    dtype = next(a.dtype for a in arguments if isinstance(a, Tensor))
    for tensor in (a for a in arguments if isinstance(a, Tensor)):
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
        raise MemoryError(f"native {name} got no memory for its windows")


@cache
def _library(dtype: torch.dtype) -> ctypes.CDLL:
    return ctypes.CDLL(str(_build()[0] / f"{_TYPES[dtype]}.so"))


@cache
def _build() -> tuple[Path, str | None]:
    """The folder of the libraries, and what was missing."""
    compiler = shutil.which(os.environ.get("CC") or "cc")
    if compiler is None:
        return Path(), "no C compiler (cc, or what CC names) was found"
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
    """Where the libraries of this source, compiler and processor belong."""
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True)
    cpu = Path("/proc/cpuinfo")
    flags = [
        line for line in cpu.read_text().splitlines() if line.startswith(("flags", "Features"))
    ]
    key = (
        *(path.read_text() for path in (*_SOURCES, _HEADER)),
        version.stdout,
        str(_FLAGS),
        flags[0] if flags else "",
    )
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "dense-backbones" / hashlib.sha256("\n".join(key).encode()).hexdigest()[:16]


def _compile(compiler: str, name: str, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        built = Path(scratch) / f"{name}.so"
        command = [
            compiler,
            *_FLAGS,
            f"-DREAL={name}",
            *map(str, _SOURCES),
            "-o",
            str(built),
            "-lm",
        ]
        subprocess.run(command, capture_output=True, text=True, check=True, timeout=300)
        # Several processes may build at once; each puts a whole file in place.
        built.replace(folder / f"{name}.so")
