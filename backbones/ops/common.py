"""Helpers of the operators: padding, autocast, sums, constants, autograd, forced backends."""

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import lru_cache, wraps
from importlib import import_module
from types import ModuleType
from typing import NoReturn, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx.node import has_side_effect

T = TypeVar("T")


class _Here(threading.local):
    backend: str | None = None
    traced: bool = False
    engine: str | None = None


here = _Here()
"""Of this thread: the ``backend`` that :func:`forced_here` asks for, None if it does not, whether a
compiler traces the launches of Triton kernels (:func:`traced_here`), and the engine that graphs are
captured for (:func:`.dispatch.graphs_for`)."""


@contextmanager
def forced_here(backend: str) -> Iterator[None]:
    """Force a backend in this thread alone, for comparisons; it must be able to run."""
    before, here.backend = here.backend, backend
    try:
        yield
    finally:
        here.backend = before


@contextmanager
def traced_here() -> Iterator[None]:
    """Put the launches of Triton kernels in this thread into the graph that is being traced."""
    before, here.traced = here.traced, True
    try:
        yield
    finally:
        here.traced = before


def same_padding(kernel_size: int) -> tuple[int, int]:
    """Zeros before and after an axis that keep its length; an even kernel gets one more after."""
    return (kernel_size - 1) // 2, kernel_size // 2


def autocast_dtype(x: Tensor) -> torch.dtype:
    """Autocast's dtype on the device of ``x``; its own if autocast is off or ``x`` is float64."""
    # Autocast cannot be queried for the meta device.
    return x.dtype if x.is_meta else dtype_under_autocast(x.dtype, x.device.type)


def dtype_under_autocast(dtype: torch.dtype, device: str) -> torch.dtype:
    """:func:`autocast_dtype` of a map of ``dtype`` on a type of device."""
    if dtype == torch.float64 or not torch.is_autocast_enabled(device):
        return dtype
    return torch.get_autocast_dtype(device)


def without_autocast(x: Tensor) -> AbstractContextManager:
    """A context in which autocast is off on the device of ``x``.

    Where torch.fx may trace the caller, pass a parameter instead of a map: the nodes that enter and
    leave the context stay in every extracted graph, and so do the nodes that compute ``x``.
    """
    if isinstance(x, torch.fx.Proxy):
        return _InGraph(x, False)
    # Engines that run ONNX know no autocast.
    if x.is_meta or here.engine == "onnx":
        return nullcontext()
    return torch.autocast(x.device.type, enabled=False)


def without_float16(weight: Tensor) -> AbstractContextManager:
    """A context in which autocast is off where it would be to float16, of wider weights."""
    if isinstance(weight, torch.fx.Proxy):
        return _InGraph(weight, True)
    return without_autocast(weight) if _narrows(weight) else nullcontext()


def widened(x: Tensor, weight: Tensor) -> Tensor:
    """``x`` in the dtype of ``weight`` where :func:`without_float16` turns autocast off."""
    return x.to(weight.dtype) if _narrows(weight) else x


def _narrows(weight: Tensor) -> bool:
    return autocast_dtype(weight) == torch.float16 != weight.dtype


class _InGraph(AbstractContextManager):
    """A context in a graph that torch.fx traces: a node that enters and one that leaves it."""

    def __init__(self, x: torch.fx.Proxy, float16_only: bool):
        self.given = x, float16_only

    def __enter__(self) -> None:
        self.entered = _enter(*self.given)

    def __exit__(self, *_) -> None:
        _leave(self.entered)


@has_side_effect
@torch.fx.wrap
def _enter(x: Tensor, float16_only: bool) -> AbstractContextManager:
    context = without_float16(x) if float16_only else without_autocast(x)
    context.__enter__()
    return context


@has_side_effect
@torch.fx.wrap
def _leave(context: AbstractContextManager) -> None:
    context.__exit__(None, None, None)


def refuse_scripting() -> NoReturn:
    """What TorchScript's hook ``__prepare_scriptable__`` does of our mixers and operators."""
    raise RuntimeError(
        "torch.jit.script does not compile these networks: use torch.export, or torch.jit.trace, "
        "which is right at every image size (backbones/README.md, Compiling and exporting)"
    )


def leaf(function: Callable[..., T]) -> Callable[..., T]:
    """Decorate a function that stays a call in graphs; its file passes it to ``torch.fx.wrap`` too.

    ``torch.jit.script`` of such a graph raises :func:`refuse_scripting`'s error.
    """
    function.__prepare_scriptable__ = refuse_scripting
    return function


def promoted(first: Tensor, *others: Tensor) -> Tensor | list[Tensor]:
    """Contiguous tensors in the accumulation dtype of ``first``, float32 at least.

    Returns:
        A tensor for a single argument, otherwise a list.
    """
    dtype = torch.promote_types(first.dtype, torch.float32)
    tensors = [x.to(dtype).contiguous() for x in (first, *others)]
    return tensors if others else tensors[0]


def pad(x: Tensor, size: int) -> Tensor:
    """Zero-pad H and W of ``(B, H, W, S, G)`` for a kernel of ``size``."""
    return F.pad(x, (0, 0, 0, 0, *same_padding(size), *same_padding(size)))


def inside(padded: Tensor, shape: torch.Size, size: int) -> Tensor:
    """Undo :func:`pad`: the part of ``shape`` inside the padding."""
    first = same_padding(size)[0]
    return padded[:, first : first + shape[1], first : first + shape[2]].contiguous()


def windows(padded: Tensor, shape: torch.Size, size: int) -> list[Tensor]:
    """The K*K views ``(B, H, W, ...)`` of a padded map that the taps multiply, row by row."""
    height, width = shape[1:3]
    return [
        padded[:, row : row + height, column : column + width]
        for row in range(size)
        for column in range(size)
    ]


def sum_of_rows(x: Tensor, size: int, kernels: Callable[[int], Tensor]) -> Tensor:
    """The sum over K*K taps of a window of ``x`` times the tap's kernels, for exported graphs.

    Graphs are captured faster the fewer nodes they have: K taps are one product.

    Args:
        x: ``(B, H, W, S, G)``.
        size: K.
        kernels: of a row of taps, ``(B, H, W, 1, G, K)``.

    Returns:
        ``(B, H, W, S, G)``.
    """
    across = pad(x, size).unfold(2, size, 1)
    products = (across[:, row : row + x.shape[1]] * kernels(row) for row in range(size))
    return sum(product.sum(-1) for product in products)


def constant(make: Callable[..., T]) -> Callable[..., T]:
    """Decorate a function of sizes, dtype and device to keep the tensors that it returns.

    Graphs that are captured and modes of fake tensors get their own.
    """
    kept = lru_cache(maxsize=64)(make)

    @wraps(make)
    def made(*given: object) -> T:
        if torch.compiler.is_compiling() or type(torch.empty(0, device="cpu")) is not Tensor:
            return make(*given)
        # A tensor of inference mode could not be saved for a later backward pass.
        with torch.inference_mode(False):
            return kept(*given)

    return made


def triton_kernels(name: str) -> ModuleType:
    """A module of :mod:`backbones.ops.triton_kernels`, imported on first use: it needs Triton."""
    return import_module(f"backbones.ops.triton_kernels.{name}")


def register_backward(operator: torch.library.CustomOpDef, backward: Callable) -> None:
    """Make ``backward(grad, *inputs)`` the gradient of a custom operator.

    The operator's tensors come before its sizes; ``backward`` returns a gradient for each tensor.
    """

    def save(ctx, inputs, output) -> None:
        ctx.sizes = [x for x in inputs if not isinstance(x, Tensor)]
        ctx.save_for_backward(*(x for x in inputs if isinstance(x, Tensor)))

    def differentiate(ctx, grad: Tensor):
        return *backward(grad, *ctx.saved_tensors, *ctx.sizes), *[None] * len(ctx.sizes)

    operator.register_autograd(differentiate, setup_context=save)
