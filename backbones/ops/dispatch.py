"""The one place that chooses how an operator is computed.

Paths, slowest first: ``reference`` (plain and differentiated by autograd: the truth), ``torch``
(no compiler), ``native`` (C, built on first use, for a CPU), ``onednn`` (the library's products,
which PyTorch keeps for compiled graphs).
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from backbones.ops import native

PATHS = ("reference", "torch", "native", "onednn")
OPERATORS = {
    "depthwise_conv": ("reference", "torch", "native"),
    "dynamic_depthwise_conv": ("reference", "torch", "native"),
    "inhomogeneous_dynamic_depthwise_conv": ("reference", "torch", "native"),
    "window_attention": ("reference", "torch", "native"),
    "local_mlp": ("reference", "torch", "native"),
    "linear": ("reference", "torch", "onednn"),
}
ENVIRONMENT = "DENSE_OPS"

_forced: str | None = None


@contextmanager
def force(path: str | None) -> Iterator[None]:
    """Compute every operator that has ``path`` by it, whatever would be faster; None chooses.

    The environment variable ``DENSE_OPS`` does the same for a whole process; this wins over it.

    Raises:
        ValueError: there is no such path, or it cannot run on this machine.
    """
    global _forced
    _check(path)
    before, _forced = _forced, path
    try:
        yield
    finally:
        _forced = before


def choose(operator: str, x: Tensor) -> str:
    """The path that ``operator`` takes for a map ``x``."""
    return explain(operator, x.device.type, x.dtype)[0]


def exporting() -> bool:
    """Whether a graph is being captured that must hold in other runtimes."""
    return torch.compiler.is_exporting() or torch.onnx.is_in_onnx_export() or torch.jit.is_tracing()


def explain(operator: str, device: str, dtype: torch.dtype) -> tuple[str, str]:
    """The path that ``operator`` takes on a kind of device, and why.

    Raises:
        ValueError: ``DENSE_OPS`` names no path or one that cannot run on this machine.
    """
    if exporting():
        return "torch", "an exported graph holds PyTorch's own operators only"
    known = OPERATORS[operator]
    if "onednn" in known and (reason := _no_onednn(device, dtype)) is not None:
        return "torch", reason
    wanted, by = (_forced, "ops.force") if _forced is not None else _environment()
    if wanted in known and not (wanted == "native" and device != "cpu"):
        return wanted, f"forced by {by}"
    if "native" in known and device == "cpu" and wanted is None:
        missing = native.missing()
        if missing is None and operator == "depthwise_conv" and not torch.is_grad_enabled():
            return "torch", "oneDNN has the faster forward pass; with gradients C has"
        if missing is None:
            return "native", "C, faster than the others on a CPU"
        return "torch", missing
    if "onednn" in known and wanted is None:
        return "onednn", "faster than PyTorch's own products"
    if device != "cpu":
        return "torch", "PyTorch's own operators"
    return "torch", f"it has no path {wanted}" if wanted else "the fastest on a CPU"


def _no_onednn(device: str, dtype: torch.dtype) -> str | None:
    if device != "cpu" or dtype != torch.float32 or torch.is_autocast_enabled("cpu"):
        return "PyTorch's own products"
    if torch.compiler.is_compiling():
        return "a compiled graph chooses itself"
    if not torch.backends.mkldnn.is_available():
        return "this PyTorch was built without oneDNN"
    if not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return "this PyTorch does not lend oneDNN's products"
    return None


def _environment() -> tuple[str | None, str]:
    path = os.environ.get(ENVIRONMENT) or None
    _check(path)
    return path, ENVIRONMENT


def _check(path: str | None) -> None:
    if path is None:
        return
    if path not in PATHS:
        raise ValueError(f"{ENVIRONMENT}={path!r}: {', '.join(PATHS)} are valid")
    if path == "native" and (missing := native.missing()) is not None:
        raise ValueError(f"{ENVIRONMENT}=native: {missing}")
