"""Compiles the C kernels into a shared library and keeps it in a cache that others cannot write.

A wheel built by ``make wheel`` holds compiled ones (:func:`packaged`); the rest is for all others.

The cache is ``$XDG_CACHE_HOME/dense-backbones``, or ``~/.cache/dense-backbones``. Loading a library
runs its code, so a file is loaded only if this user owns it, nobody else can write it or a folder
on its path, and its name holds the hash of its content. A cache that does not meet this is left
alone, with one warning, and each process compiles into a folder of its own; so it does if there is
no home folder.
"""

import contextlib
import ctypes
import fcntl
import grp
import hashlib
import itertools
import os
import platform
import pwd
import shlex
import shutil
import stat
import subprocess
import tempfile
import time
import warnings
from collections.abc import Iterator
from functools import cache
from pathlib import Path

SECONDS = 300
"""How long a compiler may take, and how long a process waits for another one that compiles."""

_SOURCES = tuple(
    Path(__file__).with_name(f"{name}.c")
    for name in ("depthwise", "inhomogeneous", "mlp", "sliding", "windows")
)
_HEADERS = tuple(Path(__file__).with_name(f"{name}.h") for name in ("factors", "matrix", "product"))
# By the type of maps; sums are in float if maps have 16 bits.
TYPES = {
    "float": ("-DREAL=float",),
    "double": ("-DREAL=double",),
    "bfloat16": ("-DREAL=float", "-DBFLOAT16"),
    "float16": ("-DREAL=float", "-DFLOAT16"),
}
_FLAGS = ("-O3", "-march=native", "-fopenmp", "-shared", "-fPIC")
_PACKAGED = Path(__file__).with_name("kernels")
# What the packaged libraries are compiled for, as compilers and /proc/cpuinfo name it, best first.
# PyTorch's get_cpu_capability() would not do: ATEN_CPU_CAPABILITY overrides it, to what the
# processor lacks too.
_AVX2 = ("avx2", "fma", "f16c")
_AVX512 = ("avx512f", "avx512bw", "avx512dq", "avx512vl", *_AVX2)
INSTRUCTIONS = {
    "avx512bf16": ("avx512bf16", *_AVX512),
    "avx512": _AVX512,
    "avx2": _AVX2,
}


class MissingCompiler(Exception):
    """There is no C compiler, or none that the kernels are written for."""


def compiler() -> list[str]:
    """The command of the C compiler: ``CC``, which may hold arguments, or ``cc``.

    Raises:
        MissingCompiler: it is not on the path, or this is not Linux.
    """
    if platform.system() != "Linux":
        raise MissingCompiler(f"the C kernels are built on Linux only, not on {platform.system()}")
    try:
        command = shlex.split(os.environ.get("CC", "")) or ["cc"]
    except ValueError as error:
        raise MissingCompiler(f"CC={os.environ['CC']}: {error}") from error
    if shutil.which(command[0]) is None:
        raise MissingCompiler("no C compiler was found: neither cc nor one that CC names")
    return command


def load(command: list[str], kind: str) -> ctypes.CDLL:
    """Load the kernels for maps of a type, a key of :data:`TYPES`; compile them if need be.

    Raises:
        OSError: the cache cannot be written, or the library cannot be loaded.
        subprocess.SubprocessError: the compiler failed, or took longer than :data:`SECONDS`.
    """
    folder = _cache(_key(command))
    if (found := _intact(folder, kind)) is None:
        with _alone(folder):
            # Another process may have compiled it in the meantime.
            found = _intact(folder, kind) or _compile(command, kind, folder)
    return ctypes.CDLL(str(found))


def suits(kind: str) -> bool:
    """Whether the processor has what the kernels for maps of a type need."""
    return kind != "float16" or "f16c" in _processor().split()


def packaged(kind: str) -> Path | None:
    """The kernels for maps of a type in the installed package, None if none fits the processor.

    ``import torch`` must come before they are loaded: OpenMP's functions are PyTorch's.
    """
    if _PACKAGED.is_dir():
        flags = _processor().replace("_", "").split()
        for name, needs in INSTRUCTIONS.items():
            if set(needs) <= set(flags):
                return _PACKAGED / f"{kind}-{name}.so"
    return None


def package(folder: Path) -> None:
    """Compile the kernels that :func:`packaged` finds into ``folder``, for ``setup.py``.

    Raises:
        MissingCompiler: see :func:`compiler`.
        OSError: they need more than the C library and GNU's OpenMP, with another compiler than GCC.
        subprocess.CalledProcessError: the compiler failed.
    """
    command, sources = compiler(), [path.absolute() for path in _SOURCES]
    folder.mkdir(parents=True, exist_ok=True)
    ctypes.CDLL("libgomp.so.1", mode=ctypes.RTLD_GLOBAL)
    for (kind, types), (name, needs) in itertools.product(TYPES.items(), INSTRUCTIONS.items()):
        # 256 bits is what GCC prefers on Intel's processors, and the width of the kernels' vectors.
        flags = [*(f"-m{need}" for need in needs), "-mprefer-vector-width=256", *types]
        built = folder.absolute() / f"{kind}-{name}.so"
        with tempfile.TemporaryDirectory() as scratch:
            compile_ = [*command, "-O3", "-fopenmp", "-fPIC", *flags, "-c", *sources]
            subprocess.run(compile_, cwd=scratch, check=True)
            # Without -fopenmp no OpenMP is linked: PyTorch's, loaded before, is the only one.
            objects = sorted(Path(scratch).iterdir())
            subprocess.run([*command, "-shared", "-s", *objects, "-o", built, "-lm"], check=True)
        ctypes.CDLL(str(built))


def _processor() -> str:
    cpu = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line for line in cpu if line.startswith(("flags", "Features"))), "")


def _key(command: list[str]) -> str:
    """A hash of everything that the machine code depends on."""
    version = subprocess.run([*command, "--version"], capture_output=True, text=True, check=True)
    sources = [path.read_text() for path in (*_SOURCES, *_HEADERS)]
    options = f"{_FLAGS} {TYPES}"
    key = *sources, *command, version.stdout, options, _processor(), *platform.libc_ver()
    return hashlib.sha256("\n".join(key).encode()).hexdigest()[:16]


@cache
def _cache(key: str) -> Path:
    try:
        root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        folder = root.absolute() / "dense-backbones" / key
        root.mkdir(parents=True, exist_ok=True, mode=0o700)
        folder.parent.mkdir(exist_ok=True, mode=0o700)  # parents=True would leave its mode to umask
        folder.mkdir(exist_ok=True, mode=0o700)
        folder = folder.resolve()
        if (reason := _untrusted(folder)) is None and os.access(folder, os.W_OK | os.X_OK):
            return folder
        if reason is not None:
            message = f"{reason}; the C kernels are compiled for this process alone"
            warnings.warn(message, RuntimeWarning, stacklevel=2)
    except (OSError, RuntimeError):  # the folder cannot be made, or there is no home
        pass
    folder = Path(_scratch().name) / key
    folder.mkdir(mode=0o700, exist_ok=True)
    return folder


@cache
def _scratch() -> tempfile.TemporaryDirectory:
    """A folder of this process, removed at its end."""
    return tempfile.TemporaryDirectory(prefix="dense-backbones-")


def _untrusted(path: Path) -> str | None:
    """Why somebody else could put a file of theirs at ``path``, None if nobody can."""
    for place in (path, *path.parents):
        about = place.stat()
        # In a sticky folder, such as /tmp, only the owner replaces an entry.
        sticky = place != path and about.st_mode & stat.S_ISVTX
        owners = (os.geteuid(),) if place == path else (os.geteuid(), 0)
        if about.st_uid not in owners:
            return f"{place} belongs to user {about.st_uid}"
        writers = about.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
        if writers == stat.S_IWGRP and _is_of_this_user_alone(about.st_gid):
            writers = 0
        if writers and not sticky:
            return f"{place} can be written by others"
    return None


def _is_of_this_user_alone(group: int) -> bool:
    """Whether it is the group that many systems make for each user, with no other member."""
    try:
        user, about = pwd.getpwuid(os.geteuid()).pw_name, grp.getgrgid(group)
    except KeyError:
        return False
    return about.gr_name == user and set(about.gr_mem) <= {user}


def _intact(folder: Path, kind: str) -> Path | None:
    """The library in ``folder`` whose content is whole; damaged ones are removed."""
    for path in sorted(folder.glob(f"{kind}-*.so")):
        if path.is_symlink() or _untrusted(path) is not None:
            continue
        if path.stem == f"{kind}-{_digest(path)}":
            return path
        path.unlink(missing_ok=True)
    return None


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:32]


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Hold the lock of ``folder``, so that one process on a machine compiles and others wait."""
    with open(folder / "lock", "w") as lock:
        end = time.monotonic() + SECONDS
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > end:
                    raise TimeoutError(f"{folder}/lock was held for {SECONDS} s") from None
                time.sleep(0.1)
            except OSError:  # a file system without locks
                break
        yield


def _compile(command: list[str], kind: str, folder: Path) -> Path:
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        built = Path(scratch) / f"{kind}.so"
        build = [*command, *_FLAGS, *TYPES[kind], *_SOURCES, "-o", built, "-lm"]
        subprocess.run(build, capture_output=True, text=True, check=True, timeout=SECONDS)
        built.chmod(0o700)
        with open(built, "rb") as file:
            os.fsync(file.fileno())
        final = folder / f"{kind}-{_digest(built)}.so"
        try:
            os.link(built, final)
        except FileExistsError:
            pass
        except OSError:  # a file system without hard links
            built.replace(final)
    return final
