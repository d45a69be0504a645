"""Helpers of the operators: padding, autocast, sums, constants, autograd, forced backends."""

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import lru_cache, wraps
from importlib import import_module
from types import ModuleType
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

T = TypeVar("T")


class _Here(threading.local):
    backend: str | None = None


here = _Here()
"""The backend that :func:`forced_here` asks for in this thread, None if it does not."""


@contextmanager
def forced_here(backend: str) -> Iterator[None]:
    """Force a backend in this thread alone, for comparisons; it must be able to run."""
    before, here.backend = here.backend, backend
    try:
        yield
    finally:
        here.backend = before


def same_padding(kernel_size: int) -> tuple[int, int]:
    """Zeros before and after an axis that keep its length; an even kernel gets one more after."""
    return (kernel_size - 1) // 2, kernel_size // 2


def autocast_dtype(x: Tensor) -> torch.dtype:
    """Autocast's dtype on the device of ``x``; its own if autocast is off or ``x`` is float64."""
    kind = x.device.type
    # Autocast cannot be queried for the meta device.
    if x.is_meta or not torch.is_autocast_enabled(kind) or x.dtype == torch.float64:
        return x.dtype
    return torch.get_autocast_dtype(kind)


def without_autocast(x: Tensor) -> AbstractContextManager:
    """A context in which autocast is off on the device of ``x``."""
    return nullcontext() if x.is_meta else torch.autocast(x.device.type, enabled=False)


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
