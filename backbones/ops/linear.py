"""Matrix products over channels, by whatever is fastest for them on a CPU."""

import math
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from backbones.ops import native
from backbones.ops.dispatch import choose

# Numbers between the layers of an MLP at a time, 8 MB: a processor's caches hold them, and larger
# ones would get fresh memory from the system every time, page by page.
_HIDDEN = 2**21


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
    """Linear, GELU, linear. On a CPU what GELU makes is never held whole, nor kept for gradients.

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
    parameters = weight1, bias1, weight2, bias2
    # In this order: a compiled graph is not to be bound to a size.
    if choose("linear", x) == "onednn" and x.numel() and _fit(x, weight1, bias1):
        if weight1.numel() and _fit(x.new_empty(0, len(weight1)), weight2, bias2):
            if torch.is_grad_enabled():
                return _Mlp.apply(x, *parameters)[0]
            if x.numel() // x.shape[-1] * len(weight1) > _HIDDEN:
                return _mlp_by_pieces(x, *parameters)
    return _mlp(x, *parameters)


def _mlp(x: Tensor, weight1: Tensor, bias1, weight2: Tensor, bias2) -> Tensor:
    return linear(linear(x, weight1, bias1, gelu=True), weight2, bias2)


def _mlp_by_pieces(x: Tensor, weight1: Tensor, bias1, weight2: Tensor, bias2) -> Tensor:
    rows = x.reshape(-1, x.shape[-1])
    out = rows.new_empty(rows.shape[0], weight2.shape[0])
    size = _rows(rows.shape[0], weight1.shape[0])
    for part, into in zip(rows.split(size), out.split(size), strict=True):
        into.copy_(_mlp(part, weight1, bias1, weight2, bias2))
    return out.view(*x.shape[:-1], -1)


def _rows(rows: int, hidden: int) -> int:
    """Rows of a piece; pieces are alike."""
    return math.ceil(rows / math.ceil(rows * hidden / _HIDDEN))


class _Mlp(torch.autograd.Function):
    """Of what lies between the layers only GELU's input is kept; the rest comes and goes by pieces.

    Returns the output and that input, ``(M, D)``, which nobody differentiates.
    """

    @staticmethod
    def forward(x: Tensor, weight1: Tensor, bias1, weight2: Tensor, bias2):
        before = _onednn(x.reshape(-1, x.shape[-1]), weight1, bias1)
        out = x.new_empty(before.shape[0], weight2.shape[0])
        size = _rows(*before.shape)
        after = x.new_empty(size, before.shape[1])
        for part, into in zip(before.split(size), out.split(size), strict=True):
            hidden = torch.ops.aten.gelu.out(part, out=after[: len(part)])
            into.copy_(_onednn(hidden, weight2, bias2))
        return torch.ops.aten._unsafe_view(out, (*x.shape[:-1], weight2.shape[0])), before

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(*inputs, output[1])

    @staticmethod
    def backward(ctx, grad: Tensor, _: Tensor):
        *inputs, before = ctx.saved_tensors
        if torch.is_grad_enabled():
            return _mlp_gradients(grad, *inputs)
        x, weight1, _, weight2, _ = inputs
        wanted = ctx.needs_input_grad
        rows, grad_rows = x.reshape(-1, x.shape[-1]), grad.reshape(-1, grad.shape[-1])
        grad_x = grad.new_empty(rows.shape) if wanted[0] else None
        size, sums = _rows(*before.shape), [None] * 3
        after = before.new_empty(size, before.shape[1])
        for start in range(0, len(before), size):
            piece, hidden = slice(start, start + size), after[: len(before) - start]
            grad_before = _onednn(grad_rows[piece], weight2.t(), None)
            _gelu_backward(before[piece], grad_before, hidden)
            if wanted[0]:
                grad_x[piece] = _onednn(grad_before, weight1.t(), None)
            parts = (
                _weight_gradient(grad_before, rows[piece]) if wanted[1] else None,
                grad_before.sum(0) if wanted[2] else None,
                _weight_gradient(grad_rows[piece], hidden) if wanted[3] else None,
            )
            sums = list(map(_added, sums, parts))
        last = grad_rows.sum(0) if wanted[4] else None
        return None if grad_x is None else grad_x.view(x.shape), *sums, last


def _added(total: Tensor | None, part: Tensor | None) -> Tensor | None:
    return part if total is None else total.add_(part)


def _mlp_gradients(grad: Tensor, x: Tensor, weight1: Tensor, bias1, weight2: Tensor, bias2):
    """The same of the inputs alone, to be differentiated once more."""
    before = linear(x, weight1, bias1)
    grad_before = torch.ops.aten.gelu_backward(linear(grad, weight2.t()), before)
    rows, after, back, grad = (
        t.reshape(-1, t.shape[-1]) for t in (x, F.gelu(before), grad_before, grad)
    )
    return (
        linear(grad_before, weight1.t()),
        back.t() @ rows,
        None if bias1 is None else back.sum(0),
        grad.t() @ after,
        None if bias2 is None else grad.sum(0),
    )


def _gelu_backward(x: Tensor, grad: Tensor, out: Tensor) -> None:
    """out becomes GELU of x; grad, the gradient of that, becomes the one of x."""
    if native.missing() is None:
        native.call("gelu_backward", x, grad, out, x.numel())
    else:
        torch.ops.aten.gelu.out(x, out=out)
        torch.ops.aten.gelu_backward.grad_input(grad, x, grad_input=grad)


def _fit(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """What does not is PyTorch's to report: oneDNN's message names nothing."""
    if bias is not None and (bias.dtype != x.dtype or bias.shape != weight.shape[:1]):
        return False
    return weight.dtype == x.dtype and x.dim() > 0 and x.shape[-1:] == weight.shape[1:]


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
    shape, x = (*x.shape[:-1], weight.shape[0]), x.reshape(-1, x.shape[-1])
    if weight.numel() > max(2**20, 100 * x.numel()):
        # Few rows by a large weight, a predictor's: what counts is to read the weight in order.
        out = (weight @ x.t()).t().contiguous()
        out = out if bias is None else out.add_(bias)
        out = F.gelu(out) if gelu else out
    else:
        name = "gelu" if gelu else "none"
        out = torch.ops.mkldnn._linear_pointwise(x, weight, bias, name, [], "none" if gelu else "")
    # To autograd a plain view would be one, which nobody may modify in place.
    return torch.ops.aten._unsafe_view(out, shape)
