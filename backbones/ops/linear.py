"""Matrix products over channels, by whatever is fastest for them on a CPU."""

from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from backbones.ops import native
from backbones.ops.dispatch import choose

# Numbers between the layers of an MLP at a time, 16 MB: larger ones get fresh memory from the
# system every time, page by page.
_HIDDEN = 2**22


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, gelu: bool = False) -> Tensor:
    """``x @ weight.T + bias``, and GELU (the exact one) over it.

    Args:
        x: ``(..., C)``.
        weight: ``(D, C)``.
        bias: ``(D,)`` or None.
        gelu: apply GELU to the result.

    Returns:
        ``(..., D)``.

    Raises:
        RuntimeError: x and the weight are of different C or dtype, as PyTorch's own layer has it.
    """
    if choose("linear", x) == "onednn" and x.numel() and _fit(x, weight, bias):
        if not torch.is_grad_enabled():
            return _onednn(x, weight, bias, gelu)
        out = _Linear.apply(x, weight, bias)
    else:
        out = F.linear(x, weight, bias)
    return F.gelu(out) if gelu else out


def mlp(
    x: Tensor, weight1: Tensor, bias1: Tensor | None, weight2: Tensor, bias2: Tensor | None
) -> Tensor:
    """Linear, GELU, linear. On a CPU without gradients what is between them stays small.

    Args:
        x: ``(..., C)``.
        weight1: ``(D, C)``.
        bias1: ``(D,)`` or None.
        weight2: ``(E, D)``.
        bias2: ``(E,)`` or None.

    Returns:
        ``(..., E)``.

    Raises:
        RuntimeError: sizes or dtypes differ, as PyTorch's own layers have it.
    """
    # In this order: a compiled graph is not to be bound to a size.
    if not torch.is_grad_enabled() and choose("linear", x) == "onednn" and x.dim():
        rows, hidden = x.numel() // max(1, x.shape[-1]), weight1.shape[0]
        if rows * hidden > _HIDDEN:
            out = x.new_empty(rows, weight2.shape[0])
            size = max(1, _HIDDEN // hidden)
            for part, into in zip(x.reshape(rows, -1).split(size), out.split(size), strict=True):
                into.copy_(linear(linear(part, weight1, bias1, gelu=True), weight2, bias2))
            return out.view(*x.shape[:-1], -1)
    return linear(linear(x, weight1, bias1, gelu=True), weight2, bias2)


def _fit(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """What does not is PyTorch's to report: oneDNN's message names nothing."""
    same = weight.dtype == x.dtype and (bias is None or bias.dtype == x.dtype)
    return same and x.dim() > 0 and x.shape[-1] == weight.shape[1]


class _Linear(torch.autograd.Function):
    """oneDNN for the output and, without gradients of gradients, for both gradients."""

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return _onednn(x, weight, bias)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        x, weight, _ = inputs
        ctx.save_for_backward(x, weight)

    @staticmethod
    def backward(ctx, grad: Tensor):
        x, weight = ctx.saved_tensors
        wanted = ctx.needs_input_grad
        rows = grad.reshape(-1, grad.shape[-1])
        return (
            linear(grad, weight.t()) if wanted[0] else None,
            _weight_gradient(rows, x.reshape(-1, x.shape[-1])) if wanted[1] else None,
            rows.sum(0) if wanted[2] else None,
        )


def _weight_gradient(grad: Tensor, x: Tensor) -> Tensor:
    """``(M, D)`` and ``(M, C)`` to ``(D, C)``."""
    if torch.is_grad_enabled() or _mkl_is_fast() or not x.numel() or native.missing() is not None:
        return grad.t() @ x
    # oneDNN is slow with a turned map on its left only: turn it, or the other one and the result.
    if grad.numel() <= x.numel() + grad.shape[1] * x.shape[1]:
        return _onednn(_transposed(grad), x.t(), None)
    return _transposed(_onednn(_transposed(x), grad.t(), None))


def _transposed(x: Tensor) -> Tensor:
    out = x.new_empty(x.shape[::-1])
    native.call("transposed", x.contiguous(), out, *x.shape)
    return out


@cache
def _mkl_is_fast() -> bool:
    """MKL, whose plain products PyTorch takes, has its fastest code on Intel's processors only."""
    cpu = Path("/proc/cpuinfo")
    return not cpu.exists() or "AuthenticAMD" not in cpu.read_text()


def _onednn(x: Tensor, weight: Tensor, bias: Tensor | None, gelu: bool = False) -> Tensor:
    if weight.numel() > max(2**20, 100 * x.numel()):
        # Few rows by a large weight, a predictor's: what counts is to read the weight in order.
        out = (weight @ x.reshape(-1, x.shape[-1]).t()).t().unflatten(0, x.shape[:-1])
        out = out if bias is None else out + bias
        return F.gelu(out) if gelu else out
    name = "gelu" if gelu else "none"
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, name, [], "none" if gelu else "")
