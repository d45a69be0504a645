"""Calls of ``nn.Linear`` in float32, as 1x1 convolutions by oneDNN where MKL is slow.

PyTorch's linear layers take float32 products on a CPU from MKL, which computes 256 bits at a time
on AMD's processors, and its convolutions from oneDNN, which computes 512. Gradients go the same
ways. In bfloat16 both come from oneDNN.
"""

from collections.abc import Callable
from functools import wraps
from math import prod
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from backbones.ops.dispatch import choose

# Smaller products take longer as convolutions; measured with gradients on AMD's Zen 5, 2 threads.
FEWEST_ROWS = 128
FEWEST_PRODUCTS = 2**24
M = TypeVar("M", bound=nn.Module)


def fast_linears(forward: Callable[[M, Tensor], Tensor]) -> Callable[[M, Tensor], Tensor]:
    """Decorate a module's ``forward``: the linears that it calls take the faster of the two ways.

    Layers are called as ever, with their hooks; ``F.linear`` alone is replaced, for plain float32
    tensors, outside of graphs, ``torch.func`` and autocast. A recomputation
    (``torch.utils.checkpoint``) of the module goes the way that its first computation went.

    >>> class Doubled(nn.Linear):
    ...     @fast_linears
    ...     def forward(self, x):
    ...         return 2 * super().forward(x)
    """

    @wraps(forward)
    def run(self: M, x: Tensor) -> Tensor:
        if isinstance(x, torch.fx.Proxy) or choose("linear_layer", x, x) != "onednn":
            return forward(self, x)
        with _Convolutions():
            return forward(self, x)

    return run


def convolved(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``F.linear(x, weight, bias)`` as a 1x1 convolution of one image with a row.

    >>> convolved(torch.ones(2, 5, 4), torch.ones(8, 4)).shape
    torch.Size([2, 5, 8])

    Args:
        x: ``(..., C)``.
        weight: ``(D, C)``.
        bias: ``(D,)`` or None.

    Returns:
        ``(..., D)``.
    """
    rows = x.reshape(1, -1, 1, x.shape[-1]).permute(0, 3, 1, 2)
    out = F.conv2d(rows, weight[:, :, None, None], bias)
    return out.permute(0, 2, 3, 1).reshape(*x.shape[:-1], len(weight))


class _Convolutions(TorchFunctionMode):
    def __torch_function__(
        self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        if func is F.linear:
            return _linear(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    suits = _suits(input, weight, bias)
    return convolved(input, weight, bias) if suits else F.linear(input, weight, bias)


def _suits(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether a convolution is as right, and faster; of wrong sizes F.linear says what is wrong."""
    given = [x, weight] if bias is None else [x, weight, bias]
    if any(type(t) not in (Tensor, nn.Parameter) for t in given):
        return False
    if any(t.dtype != torch.float32 or t.device.type != "cpu" for t in given):
        return False
    if torch.is_autocast_enabled("cpu") or x.dim() == 0 or weight.dim() != 2:
        return False
    if x.shape[-1] != weight.shape[1] or (bias is not None and bias.shape != weight.shape[:1]):
        return False
    rows = prod(x.shape[:-1])
    return rows >= FEWEST_ROWS and rows * weight.numel() >= FEWEST_PRODUCTS
