"""Linear layers and MLPs of the models that ``backbones.fuse`` returns, by oneDNN on CPUs.

With gradients enabled both are PyTorch's own functions.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from backbones.ops.dispatch import choose

# Elements of an MLP's hidden map at a time, 8 MB of float32: they fit the CPU's cache, and the
# allocator reuses the memory; it would ask the system for larger blocks each time.
_HIDDEN = 2**21


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, gelu: bool = False) -> Tensor:
    """``x @ weight.T + bias``, with ``gelu`` followed by exact GELU.

    >>> linear(torch.ones(2, 5, 5, 4), torch.ones(8, 4), gelu=True).shape
    torch.Size([2, 5, 5, 8])

    Args:
        x: ``(..., C)``.
        weight: ``(D, C)``.
        bias: ``(D,)`` or None.
        gelu: whether to apply GELU to the result.

    Returns:
        ``(..., D)``.

    Raises:
        RuntimeError: C or the dtype differs between x and the weight; the error is PyTorch's.
    """
    if _by_onednn(x) and _fit(x, weight, bias):
        return _onednn(x, weight, bias, gelu)
    out = F.linear(x, weight, bias)
    return F.gelu(out) if gelu else out


def mlp(
    x: Tensor, weight1: Tensor, bias1: Tensor | None, weight2: Tensor, bias2: Tensor | None
) -> Tensor:
    """Linear, GELU, linear; oneDNN computes it in pieces if the hidden map exceeds 8 MB.

    >>> mlp(torch.ones(2, 4), torch.ones(16, 4), None, torch.ones(4, 16), None).shape
    torch.Size([2, 4])

    Args:
        x: ``(..., C)``.
        weight1: ``(D, C)``.
        bias1: ``(D,)`` or None.
        weight2: ``(E, D)``.
        bias2: ``(E,)`` or None.

    Returns:
        ``(..., E)``.

    Raises:
        RuntimeError: sizes or dtypes do not match; the error is PyTorch's.
    """
    parameters = weight1, bias1, weight2, bias2
    # The size is compared last: a compiled graph, which never uses oneDNN, gets no guard on it.
    if _by_onednn(x) and _fit(x, weight1, bias1):
        if x.numel() // x.shape[-1] * len(weight1) > _HIDDEN:
            return _mlp_by_pieces(x, *parameters)
    return _mlp(x, *parameters)


def _by_onednn(x: Tensor) -> bool:
    return choose("linear", x) == "onednn" and x.numel() > 0 and not torch.is_grad_enabled()


def _mlp(x: Tensor, weight1: Tensor, bias1, weight2: Tensor, bias2) -> Tensor:
    return linear(linear(x, weight1, bias1, gelu=True), weight2, bias2)


def _mlp_by_pieces(x: Tensor, weight1: Tensor, bias1, weight2: Tensor, bias2) -> Tensor:
    rows = x.reshape(-1, x.shape[-1])
    out = rows.new_empty(rows.shape[0], weight2.shape[0])
    pieces = math.ceil(len(rows) * len(weight1) / _HIDDEN)
    size = math.ceil(len(rows) / pieces)
    for part, into in zip(rows.split(size), out.split(size), strict=True):
        into.copy_(_mlp(part, weight1, bias1, weight2, bias2))
    return out.view(*x.shape[:-1], -1)


def _fit(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether shapes and dtypes match; if not, F.linear raises, with a better message."""
    if bias is not None and (bias.dtype != x.dtype or bias.shape != weight.shape[:1]):
        return False
    return weight.dtype == x.dtype and x.dim() > 0 and x.shape[-1:] == weight.shape[1:]


def _onednn(x: Tensor, weight: Tensor, bias: Tensor | None, gelu: bool) -> Tensor:
    shape, x = (*x.shape[:-1], weight.shape[0]), x.reshape(-1, x.shape[-1])
    name = "gelu" if gelu else "none"
    out = torch.ops.mkldnn._linear_pointwise(x, weight, bias, name, [], "none" if gelu else "")
    # Not a view for autograd: outputs may be modified in place.
    return torch.ops.aten._unsafe_view(out, shape)
