"""Verdicts: whether a backend gives what ``torch`` gives, found out on the processor at hand.

The first call of an operator on a GPU compares its Triton kernels, output and every gradient, with
PyTorch's operators in float64 on one small case. If they agree, Triton is used, otherwise
``torch``, with a warning. ``python -m backbones.ops --check`` compares many cases, on CPUs too, and
times them. Verdicts are kept in ``$XDG_CACHE_HOME/dense-backbones/verdicts``
(``~/.cache/dense-backbones/verdicts``) by processor, versions and the kernels' sources, one file
for each operator and dtype; where no file can be written, for the process. Processes that train
together decide each by itself, by the same rule and files.
"""

import hashlib
import json
import os
import threading
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import TypeVar

import torch

from backbones.ops.cases import Case

T = TypeVar("T")
TOLERANCES = {
    torch.float64: 1e-10,
    torch.float32: 1e-4,
    torch.float16: 5e-3,
    torch.bfloat16: 3e-2,
}
"""The largest error that counts as agreement, as a part of a tensor's largest value."""

_known: dict[tuple[str, str, str, str], "Verdict | None"] = {}
_lock = threading.RLock()


@dataclass(frozen=True)
class Verdict:
    """What is known about a backend of an operator.

    Args:
        operator: a key of :data:`backbones.ops.dispatch.OPERATORS`.
        backend: the backend that was compared with ``torch``.
        dtype: of the map, such as ``float32``.
        use: whether the backend is used by default.
        reason: a clause that says why.
        processor: as :func:`processor` describes it.
    """

    operator: str
    backend: str
    dtype: str
    use: bool
    reason: str
    processor: str


def known(operator: str, backend: str, device: str, dtype: str) -> Verdict | None:
    """The verdict of this process or of an earlier one, None if there is none."""
    key = operator, backend, device, dtype
    if key not in _known:
        _known[key] = _read(*key)
    return _known[key]


def remember(verdict: Verdict, device: str) -> None:
    """Keep a verdict: in a file if one can be written, for this process in any case."""
    key = verdict.operator, verdict.backend, device, verdict.dtype
    _known[key] = verdict
    try:
        path = _path(*key)
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        # Several processes may write at once: each its own file, then a rename.
        partial = path.with_suffix(f".{os.getpid()}-{threading.get_ident()}")
        partial.write_text(json.dumps(asdict(verdict), indent=1) + "\n")
        partial.replace(path)
    except (OSError, RuntimeError):  # a read-only or full disk, or no home folder
        pass


def every() -> list[Verdict]:
    """The verdicts in files, of all processors and versions."""
    try:
        found = [_parse(path) for path in sorted(folder().glob("*/*.json"))]
    except (OSError, RuntimeError):
        return []
    return [verdict for verdict in found if verdict is not None]


def forget() -> int:
    """Remove the files of all verdicts; returns their number.

    Raises:
        OSError: a file cannot be removed.
    """
    _known.clear()
    files = list(folder().glob("*/*.json"))
    for path in files:
        path.unlink(missing_ok=True)
    return len(files)


def folder() -> Path:
    """Where verdicts lie.

    Raises:
        RuntimeError: there is no home folder.
    """
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return root / "dense-backbones" / "verdicts"


def compare(case: Case, device: str, dtype: torch.dtype) -> Verdict:
    """Compare Triton's kernels with ``torch`` on a case, warn if they disagree, and remember it.

    Raises:
        Exception: what the kernels raised, such as an error of the compiler.
    """
    operator, name = case.operator, str(dtype).removeprefix("torch.")
    with _lock:
        # Another thread may have compared while this one waited.
        if (found := known(operator, "triton", device, name)) is not None:
            return found
        error = _alone(lambda: case.error("triton", device, dtype))
        verdict = judge(operator, "triton", device, dtype, error)
        remember(verdict, device)
    if not verdict.use:
        warnings.warn(f"{operator}: {verdict.reason}; torch is used", RuntimeWarning, stacklevel=2)
    return verdict


def judge(operator: str, backend: str, device: str, dtype: torch.dtype, error: float) -> Verdict:
    """The verdict on an error, a part of the largest value; NaN disagrees."""
    name, use = str(dtype).removeprefix("torch."), error <= TOLERANCES[dtype]
    reason = (
        f"{backend} {'agrees' if use else 'disagrees'} with torch in {name}, error {error:.1e} "
        f"(at most {TOLERANCES[dtype]:.0e})"
    )
    return Verdict(operator, backend, name, use, reason, processor(device))


def _alone(function: Callable[[], T]) -> T:
    """Call it in a thread of its own, which has none of the caller's modes.

    Autocast, inference mode, ``torch.func``, a default device and the state inside of a custom
    operator, where nothing is differentiated, belong to the caller's thread.
    """
    result: list[T] = []
    failed: list[BaseException] = []

    def run() -> None:
        try:
            result.append(function())
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=run, name="dense-backbones-verdict")
    thread.start()
    thread.join()
    if failed:
        raise failed[0]
    return result[0]


@cache
def processor(device: str) -> str:
    """What a device is: ``cuda NVIDIA H100 80GB HBM3 sm_90``, ``rocm ...`` or ``cpu ...``."""
    kind = torch.device(device).type
    if kind == "cuda":
        about = torch.cuda.get_device_properties(device)
        if torch.version.hip:
            return f"rocm {about.name} {about.gcnArchName}"
        return f"cuda {about.name} sm_{about.major}{about.minor}"
    return f"{kind} {_cpu()}"


@cache
def halved_by_mkl() -> bool:
    """Whether MKL, PyTorch's library of float32 products, uses half of this CPU's width.

    So it does on AMD's processors that compute 512 bits at a time, Zen 5 (family 26) and later.
    """
    about, capability = _cpuinfo(), torch.backends.cpu.get_cpu_capability()
    if about.get("vendor_id") != "AuthenticAMD" or capability != "AVX512":
        return False
    family = about.get("cpu family", "")
    return torch.backends.mkl.is_available() and family.isdecimal() and int(family) >= 26


def _cpu() -> str:
    about, capability = _cpuinfo(), torch.backends.cpu.get_cpu_capability()
    return f"{about.get('model name', 'unknown')} {capability}" if about else capability


def _cpuinfo() -> dict[str, str]:
    """What Linux says of the first processor; empty on other systems."""
    try:
        first = Path("/proc/cpuinfo").read_text().partition("\n\n")[0]
    except OSError:
        return {}
    lines = (line.partition(":") for line in first.splitlines())
    return {name.strip(): value.strip() for name, _, value in lines}


@cache
def _versions(backend: str) -> str:
    """Everything else that a verdict depends on: versions, and the kernels themselves."""
    versions = [torch.__version__, str(torch.version.cuda), str(torch.version.hip)]
    here = Path(__file__).parent
    sources = sorted(here.glob("*.[ch]"))
    if backend == "triton":
        import triton

        versions.append(triton.__version__)
        sources = sorted(here.glob("triton_kernels/*.py"))
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in sources))
    return " ".join([*versions, digest.hexdigest()])


def _path(operator: str, backend: str, device: str, dtype: str) -> Path:
    key = f"{processor(device)} {_versions(backend)}"
    name = f"{operator}-{backend}-{dtype}.json"
    return folder() / hashlib.sha256(key.encode()).hexdigest()[:16] / name


def _read(operator: str, backend: str, device: str, dtype: str) -> Verdict | None:
    try:
        path = _path(operator, backend, device, dtype)
        return _parse(path) if path.exists() else None
    except (OSError, RuntimeError):
        return None


def _parse(path: Path) -> Verdict | None:
    """The verdict in a file; None if it is damaged, as if there were none."""
    try:
        verdict = Verdict(**json.loads(path.read_text()))
    except (OSError, ValueError, TypeError):
        return None
    return verdict if isinstance(verdict.use, bool) else None
