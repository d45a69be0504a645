"""Matrix products over channels for inference, by what is fastest for them on a CPU.

With gradients these are PyTorch's own functions: the networks that train call ``nn.Linear``.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

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
        gelu: apply GELU to the result; the default does not.

    Returns:
        ``(..., D)``.

    Raises:
        RuntimeError: x and the weight are of different C or dtype, as PyTorch's own layer has it.
    """
    if _by_onednn(x) and _fit(x, weight, bias):
        return _onednn(x, weight, bias, gelu)
    out = F.linear(x, weight, bias)
    return F.gelu(out) if gelu else out


def mlp(
    x: Tensor, weight1: Tensor, bias1: Tensor | None, weight2: Tensor, bias2: Tensor | None
) -> Tensor:
    """Linear, GELU, linear. On a CPU the map between the two is never held whole.

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
    size = _rows(rows.shape[0], weight1.shape[0])
    for part, into in zip(rows.split(size), out.split(size), strict=True):
        into.copy_(_mlp(part, weight1, bias1, weight2, bias2))
    return out.view(*x.shape[:-1], -1)


def _rows(rows: int, hidden: int) -> int:
    """Rows of a piece; pieces are alike."""
    return math.ceil(rows / math.ceil(rows * hidden / _HIDDEN))


def _fit(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """What does not is PyTorch's to report: oneDNN's message names nothing."""
    if bias is not None and (bias.dtype != x.dtype or bias.shape != weight.shape[:1]):
        return False
    return weight.dtype == x.dtype and x.dim() > 0 and x.shape[-1:] == weight.shape[1:]


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
