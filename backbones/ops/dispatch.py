"""Choice of the backend that computes an operator.

``reference`` is plain PyTorch with autograd, the standard of the tests; ``torch`` is faster PyTorch
without a compiler; ``native`` is C for CPUs; ``onednn`` has the linear layers of compiled graphs,
for float32 and bfloat16 on CPUs, and convolutions in place of float32 linear layers; ``triton`` is
for GPUs, and for CPUs in Triton's interpreter.
Before Triton computes an operator on a GPU by default, it is compared once with ``torch``
(:mod:`backbones.ops.verdicts`).
"""

import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from importlib.util import find_spec
from math import prod
from subprocess import SubprocessError
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from backbones.ops import native, verdicts
from backbones.ops.cases import first_case
from backbones.ops.common import dtype_under_autocast, here, traced_here

BACKENDS = ("reference", "torch", "native", "onednn", "triton")
OPERATORS = {
    "depthwise_conv": ("reference", "torch", "native", "triton"),
    "dynamic_depthwise_conv": ("reference", "torch", "native", "triton"),
    "inhomogeneous_dynamic_depthwise_conv": ("reference", "torch", "native", "triton"),
    "inhomogeneous_aggregation": ("reference", "torch", "native", "triton"),
    "window_attention": ("reference", "torch", "native", "triton"),
    "local_mlp": ("reference", "torch", "native", "triton"),
    "sliding_attention": ("reference", "torch", "native", "triton"),
    "convolutional_attention": ("reference", "torch"),
    "linear": ("reference", "torch", "onednn"),
    "linear_layer": ("reference", "torch", "onednn"),
    "residual_mlp": ("reference", "torch", "native"),
}
ENVIRONMENT = "DENSE_OPS"
# Types of devices on which Triton is the default, for these operators: PyTorch's version is slow or
# materialises large intermediates.
GPUS = ("cuda",)
ON_GPUS = (
    "dynamic_depthwise_conv",
    "inhomogeneous_dynamic_depthwise_conv",
    "inhomogeneous_aggregation",
    "window_attention",
    "local_mlp",
    "sliding_attention",
)

# What oneDNN's linear computes of its result before it stores it: name, algorithm, the same here.
_EPILOGUES = (("none", "", Tensor.clone), ("relu", "", F.relu), ("gelu", "none", F.gelu))
T = TypeVar("T")
_forced: str | None = None
# From the RuntimeErrors by which LLVM's passes and the builds of Triton's launchers fail.
_COMPILERS_SAY = (
    "PassManager::run failed",
    "Failed to find C compiler",
    "Failed to load newly compiled",
    "failed to translate module to LLVM IR",
    "active drivers",
)
_UNCOMPARED = "its Triton kernels are compared with torch by the first call on this processor"
# Operators whose Triton kernels failed to compile in this process, and the reason.
_broken: dict[str, str] = {}


@contextmanager
def force(backend: str | None) -> Iterator[None]:
    """Force a backend inside a ``with`` block; operators without it use ``torch``.

    Overrides the environment variable ``DENSE_OPS``, which forces one for the whole process. None
    forces none: ``DENSE_OPS`` counts if it is set, otherwise the default is chosen.

    >>> with backbones.ops.force("reference"):
    ...     out = model(images)

    Raises:
        ValueError: the backend does not exist or cannot run on this machine.
    """
    global _forced
    _check(backend)
    before, _forced = _forced, backend
    try:
        yield
    finally:
        _forced = before


def choose(operator: str, x: Tensor, *others: Tensor | None) -> str:
    """The backend that computes ``operator`` for a map ``x``.

    The first call on a GPU compares Triton's kernels with ``torch``, unless a graph is being
    captured, compiled or traced: then ``torch`` computes until a call outside has compared them.

    Args:
        operator: a key of :data:`OPERATORS`.
        x: the map.
        others: the operator's other tensors. If given, calls under ``torch.func`` (grad, vmap, jvp)
            or with a forward-mode tangent get ``reference``, whose operators support these.
    """
    if torch.compiler.is_compiling():
        return explain(operator, x.device, x.dtype)[0]
    if here.backend is not None:
        return here.backend if here.backend in OPERATORS[operator] else "torch"
    backend, reason = explain(operator, x.device, x.dtype)
    if others and _is_transformed(x, *others):
        return "reference"
    if reason is _UNCOMPARED and _can_compare(x.device):
        case, device = first_case(operator), str(x.device)
        attempt(operator, lambda: verdicts.compare(case, device, x.dtype))
        backend = explain(operator, x.device, x.dtype)[0]
    return backend


def _can_compare(device: torch.device) -> bool:
    if device.type in GPUS and torch.cuda.is_current_stream_capturing():
        return False
    # Under a mode of fake tensors nothing can be compared.
    return type(torch.empty(0, device="cpu")) is Tensor


def _is_transformed(*tensors: Tensor | None) -> bool:
    if getattr(torch._C, "_are_functorch_transforms_active", bool)():
        return True
    given = (t for t in tensors if t is not None)
    return any(forward_ad.unpack_dual(t).tangent is not None for t in given)


def attempt(operator: str, compute: Callable[[], T]) -> T | None:
    """Run Triton kernels; if they do not compile, warn, drop them for ``operator``, return None.

    Raises:
        Exception: what ``compute`` raised, if no compiler did (an error of CUDA, memory that ran
            out, a capture that does not permit it) or if ``triton`` was forced.
    """
    try:
        return compute()
    except Exception as error:
        forced = "triton" in (_forced, here.backend, os.environ.get(ENVIRONMENT))
        if forced or not _is_of_a_compiler(error):
            raise
        said = (str(error).strip().splitlines() or [type(error).__name__])[0]
        _broken[operator] = f"Triton did not compile it: {said[:200]}"
        warnings.warn(f"{operator}: {_broken[operator]}", RuntimeWarning, stacklevel=2)
        return None


def _is_of_a_compiler(error: Exception) -> bool:
    from triton.errors import TritonError

    # Triton's own, those of the C compiler that builds its launchers, and of its cache on disk.
    if isinstance(error, TritonError | ImportError | OSError | SubprocessError):
        return True
    # CUDA's errors are RuntimeErrors too, and so is what a launch returns.
    return type(error) is RuntimeError and any(part in str(error) for part in _COMPILERS_SAY)


def operator(name: str, known: str) -> Callable[[Callable], torch.library.CustomOpDef]:
    """Decorate a function of maps to be the operator ``dense::name``, opaque to compilers.

    Only where Triton computes a map of known sizes, torch.compile sees the launches of the kernels
    in place of the operator, as with ``torch.library.triton_op``: Inductor plans their memory and
    launches them without Python. Sizes that are open would become guards, a graph for each.

    Args:
        name: of the operator.
        known: its key in :data:`OPERATORS`.
    """

    def register(function: Callable) -> torch.library.CustomOpDef:
        made = torch.library.custom_op(f"dense::{name}", mutates_args=())(function)
        try:
            from torch._subclasses.functional_tensor import FunctionalTensor, FunctionalTensorMode
        except ImportError:
            return made

        def trace(mode, op, types, args, kwargs):
            tensors = [t for t in args if isinstance(t, Tensor)]
            ordinary = all(issubclass(t, FunctionalTensor) or t is Tensor for t in types)
            if not ordinary or not _sees_through(known, tensors):
                return mode.__torch_dispatch__(op, types, args, kwargs)
            with mode, traced_here():
                return function(*args, **kwargs)

        made.register_torch_dispatch(FunctionalTensorMode, trace)
        return made

    return register


def _sees_through(known: str, tensors: list[Tensor]) -> bool:
    x = tensors[0]
    if x.device.type not in GPUS or explain(known, x.device, x.dtype)[0] != "triton":
        return False
    return not any(isinstance(n, torch.SymInt) for t in tensors for n in t.shape)


def exporting() -> bool:
    """Whether a graph is being exported (torch.export, ONNX or TorchScript tracing)."""
    return _is_exporting() or torch.onnx.is_in_onnx_export() or torch.jit.is_tracing()


@contextmanager
def graphs_for(engine: str) -> Iterator[None]:
    """Capture graphs in here for an engine, ``"onnx"`` or ``"aotinductor"``.

    ONNX's keep ``dense::predict_and_aggregate`` and ``dense::depthwise``. AOTInductor's have no
    convolution with a group for each image, whose number it would fix.
    """
    before, here.engine = here.engine, engine
    try:
        yield
    finally:
        here.engine = before


def keeps_operators() -> bool:
    """Whether graphs are captured for ONNX (:func:`graphs_for`), in this thread."""
    return here.engine == "onnx"


def fixes_groups() -> bool:
    """Whether the graph being captured would fix a number of groups that follows from the batch."""
    return bool(here.engine) or torch.onnx.is_in_onnx_export() or torch.jit.is_tracing()


@torch.compiler.assume_constant_result
def _is_exporting() -> bool:
    # If Dynamo traced this call, it would be True under torch.compile as well.
    return torch.compiler.is_exporting()


def explain(operator: str, device: torch.device | str, dtype: torch.dtype) -> tuple[str, str]:
    """The backend of ``operator`` on a device, and the reason; nothing is compared.

    >>> explain("linear", "cpu", torch.float64)
    ('torch', 'oneDNN is used for float32 and bfloat16 on a CPU only')

    Raises:
        ValueError: ``DENSE_OPS`` names an unknown backend or one that cannot run on this machine.
    """
    if exporting():
        return "torch", "exported graphs use PyTorch's operators only"
    device = torch.device(device)
    known = OPERATORS[operator]
    if "onednn" in known:
        dtype = dtype_under_autocast(dtype, "cpu")
        if (reason := _no_onednn(operator, device.type, dtype)) is not None:
            return "torch", reason
    if operator == "residual_mlp" and (reason := _no_calls()) is not None:
        return "torch", reason
    wanted, by = (_forced, "ops.force") if _forced is not None else _environment()
    if wanted == "triton" and wanted in known:
        reason = _no_triton_for(device.type, dtype)
        return ("triton", f"forced by {by}") if reason is None else ("torch", reason)
    if wanted in known and not (wanted == "native" and device.type != "cpu"):
        return wanted, f"forced by {by}"
    if wanted is not None:
        return "torch", f"it has no backend {wanted} on {device.type}"
    if device.type in GPUS and "triton" in known:
        return _on_gpu(operator, device, dtype)
    if "native" in known and device.type == "cpu":
        return _on_cpu(operator, dtype)
    if operator == "linear_layer":
        return _instead_of_mkl(operator, dtype)
    if "onednn" in known:
        return _unless_refuted(
            operator, "onednn", dtype, "without gradients faster than PyTorch's linear"
        )
    return "torch", "PyTorch's operators"


def _on_gpu(operator: str, device: torch.device, dtype: torch.dtype) -> tuple[str, str]:
    if operator not in ON_GPUS:
        return "torch", "PyTorch's operators"
    if operator in _broken:
        return "torch", _broken[operator]
    if (reason := _no_triton_for(device.type, dtype)) is not None:
        return "torch", reason
    verdict = _verdict(operator, "triton", str(device), str(dtype))
    if verdict is None:
        return "torch", _UNCOMPARED
    use, reason = verdict
    return "triton" if use else "torch", reason


def _on_cpu(operator: str, dtype: torch.dtype) -> tuple[str, str]:
    if (missing := native.missing()) is not None:
        return "torch", missing
    if operator == "depthwise_conv" and not torch.is_grad_enabled():
        if dtype != torch.float32 or not _halved_by_mkl():
            return "torch", "without gradients oneDNN's convolution is faster than C"
    if operator == "residual_mlp":
        if dtype not in (torch.float32, torch.bfloat16):
            return "torch", "C is used for float32 and bfloat16"
        if not _halved_by_mkl():
            return "torch", "C's products were measured on AMD's Zen 5 only"
    return _unless_refuted(operator, "native", dtype, "C, the fastest on a CPU")


def _halved_by_mkl() -> bool:
    # Compilers can neither ask nor gain from it.
    return not torch.compiler.is_compiling() and verdicts.halved_by_mkl()


def _unless_refuted(operator: str, backend: str, dtype: torch.dtype, why: str) -> tuple[str, str]:
    verdict = _verdict(operator, backend, "cpu", str(dtype))
    if verdict is not None and not verdict[0]:
        return "torch", verdict[1]
    return backend, why


@torch.compiler.assume_constant_result
def _verdict(operator: str, backend: str, device: str, dtype: str) -> tuple[bool, str] | None:
    found = verdicts.known(operator, backend, device, dtype.removeprefix("torch."))
    return None if found is None else (found.use, found.reason)


def _no_triton_for(device: str, dtype: torch.dtype) -> str | None:
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"the Triton kernels accumulate in float32, not in {dtype}".replace("torch.", "")
    return _no_triton(device)


@torch.compiler.assume_constant_result
def _no_triton(device: str) -> str | None:
    if find_spec("triton") is None:
        return "no Triton is installed"
    if device == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        return "Triton runs on a CPU with TRITON_INTERPRET=1 only"
    return None


def _instead_of_mkl(operator: str, dtype: torch.dtype) -> tuple[str, str]:
    if not verdicts.halved_by_mkl():
        return "torch", "PyTorch's library is as fast as oneDNN on this processor"
    if torch.get_num_threads() == 1:
        return "torch", "on one thread PyTorch does not give such convolutions to oneDNN"
    return _unless_refuted(operator, "onednn", dtype, "MKL is half as fast on this processor")


def _no_calls() -> str | None:
    if torch.compiler.is_compiling():
        return "torch.compile chooses its own kernels"
    if type(torch.empty(0, device="cpu")) is not Tensor:
        return "under a mode of fake tensors nothing is computed"
    return None


def _no_onednn(operator: str, device: str, dtype: torch.dtype) -> str | None:
    if device != "cpu" or dtype not in (torch.float32, torch.bfloat16):
        return "oneDNN is used for float32 and bfloat16 on a CPU only"
    if torch.compiler.is_compiling():
        return "torch.compile chooses its own kernels"
    if not torch.backends.mkldnn.is_available():
        return "this PyTorch was built without oneDNN"
    if operator == "linear_layer":
        if dtype != torch.float32:
            return "in bfloat16 PyTorch's linear is oneDNN's"
        return None if torch.backends.mkldnn.enabled else "torch.backends.mkldnn is not enabled"
    if type(torch.empty(0, device="cpu")) is not Tensor:
        return "under a mode of fake tensors nothing can be compared"
    return _no_linear_pointwise(dtype)


@cache
def _no_linear_pointwise(dtype: torch.dtype) -> str | None:
    """Why oneDNN's linear, which is private in PyTorch, cannot be used; None if it agrees."""
    return _differs(lambda weight: weight, dtype, "_linear_pointwise", "F.linear is used")


@cache
def no_packing(dtype: torch.dtype) -> str | None:
    """Why oneDNN's own layout of weights, private too, cannot be used; None if it agrees."""

    def pack(weight: Tensor) -> Tensor:
        return torch.ops.mkldnn._reorder_linear_weight(weight)

    return _differs(pack, dtype, "_reorder_linear_weight", "weights keep their layout")


def _differs(
    pack: Callable[[Tensor], Tensor], dtype: torch.dtype, name: str, instead: str
) -> str | None:
    def values(*shape: int) -> Tensor:
        return torch.linspace(-2, 2, prod(shape), device="cpu").view(shape).to(dtype)

    x, weight, bias = values(5, 7), values(3, 7), values(3)
    near = dict.fromkeys(("rtol", "atol"), 1e-5 if dtype == torch.float32 else 4e-2)
    try:
        with torch.no_grad(), torch.autocast("cpu", enabled=False):
            expected = F.linear(x, weight, bias)
            for activation, algorithm, then in _EPILOGUES:
                given = x, pack(weight), bias, activation, [], algorithm
                got = torch.ops.mkldnn._linear_pointwise(*given)
                torch.testing.assert_close(got, then(expected), **near)
    except (AttributeError, AssertionError, TypeError, RuntimeError) as error:
        said = (str(error).strip().splitlines() or [type(error).__name__])[0]
        reason = f"mkldnn.{name} does not do what F.linear does here: {said}"
        warnings.warn(f"{reason}; {instead}", RuntimeWarning, stacklevel=2)
        return reason
    return None


def _environment() -> tuple[str | None, str]:
    backend = os.environ.get(ENVIRONMENT) or None
    _check(backend)
    return backend, ENVIRONMENT


def _check(backend: str | None) -> None:
    if backend is None:
        return
    if backend not in BACKENDS:
        raise ValueError(f"{ENVIRONMENT}={backend!r}: {', '.join(BACKENDS)} are valid")
    if backend == "native" and (missing := native.missing()) is not None:
        raise ValueError(f"{ENVIRONMENT}=native: {missing}")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if backend == "triton" and (missing := _no_triton(device)) is not None:
        raise ValueError(f"{ENVIRONMENT}=triton: {missing}")
