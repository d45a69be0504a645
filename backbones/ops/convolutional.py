"""Convolutional attention: sliding attention with convolutions in its logits (appendix C)."""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from backbones.ops import reference
from backbones.ops.common import autocast_dtype, constant, without_autocast
from backbones.ops.dispatch import choose, exporting
from backbones.ops.halos import hidden_keys, pad_to_blocks, parts_of, take_blocks, window_keys
from backbones.ops.windows import Size, reverse

_NAME = "convolutional_attention"


def convolutional_attention(
    qkv: Tensor,
    bias: Tensor,
    num_heads: int,
    window_size: Size,
    theta: Tensor | None = None,
    kernel: Tensor | None = None,
) -> Tensor:
    """Sliding attention whose logits are convolved and have a learned part for each offset.

    With the query over ``sqrt(C / heads)``, ``q_i``, and products ``l[d] = q_i k_{i+d}``, 0 outside
    of the map, the logits are ``sum_e kernel[e] l[d+e] + q_i theta[d] + bias[d]``: a circular 3x3
    convolution over the offsets d of the window (equation 25), and static weights that the query
    multiplies (equation 24). Positions outside of the map are left out of the softmax. A few blocks
    of queries are computed at a time, and again in the backward pass.

    >>> qkv, bias, kernel = torch.ones(1, 5, 4, 24), torch.zeros(2, 9), torch.ones(2, 3, 3)
    >>> convolutional_attention(qkv, bias, 2, (3, 3), kernel=kernel).shape
    torch.Size([1, 5, 4, 8])

    Args:
        qkv: ``(B, H, W, 3*C)``, query, key and value concatenated, each head-major.
        bias: ``(heads, rows*columns)``; see :func:`backbones.ops.sliding_attention`.
        num_heads: number of heads.
        window_size: rows and columns of a window, odd.
        theta: ``(heads, rows*columns, C/heads)``, or None for 0.
        kernel: ``(heads, 3, 3)``, or None for 1 at the centre.

    Returns:
        ``(B, H, W, C)`` in the dtype of ``qkv``, or of autocast if it is on.
    """
    learned = [t for t in (theta, kernel) if t is not None]
    backend = choose(_NAME, qkv, bias, *learned)
    qkv = qkv.to(autocast_dtype(qkv))
    bias, theta, kernel = (t if t is None else t.to(qkv.dtype) for t in (bias, theta, kernel))
    given = num_heads, tuple(window_size)
    with without_autocast(qkv):
        if backend == "reference":
            return reference.convolutional_attention(qkv, bias, *given, theta, kernel)
        if exporting() or torch.compiler.is_compiling():
            height, width = qkv.shape[1:3]
            padded = pad_to_blocks(qkv, window_size)
            out = _attend(padded, bias, theta, kernel, *given, (height, width), 0)
            return out[:, :height, :width]
        return _Attend.apply(qkv, bias, theta, kernel, *given)


def _attend(
    part: Tensor,
    bias: Tensor,
    theta: Tensor | None,
    kernel: Tensor | None,
    num_heads: int,
    window_size: Size,
    size: Size,
    first: int,
) -> Tensor:
    """``(B, nH*rows, nW*columns, C)`` of a part of a padded map, as :func:`.halos.parts_of` has."""
    query, key, value = take_blocks(part, num_heads, window_size)
    query = query * query.shape[-1] ** -0.5
    keys, products = window_keys(*window_size, part.device), query @ key
    halo = products.shape[-1]
    places = keys.expand(*products.shape[:-1], -1)
    scores = products.gather(-1, places)
    if kernel is not None:
        shifts = _shifts(*window_size, part.device, part.dtype)
        scores = scores @ torch.einsum("gt,tnm->gnm", kernel.flatten(1), shifts)
    if theta is not None:
        scores = scores + query @ theta.mT
    hidden = hidden_keys(query, window_size, size, first)[:, :, :, 0, keys]
    scores = scores + bias[:, None]
    # Not -infinity: a query in the padding may see nothing else, and must not become NaN.
    weights = scores.masked_fill(hidden, torch.finfo(scores.dtype).min).softmax(-1)
    spread = weights.new_zeros(*weights.shape[:-1], halo).scatter(-1, places, weights)
    return reverse(spread @ value.mT, window_size)


class _Attend(torch.autograd.Function):
    """:func:`_attend` of one part of the map after the other, again in the backward pass."""

    @staticmethod
    def forward(ctx, qkv, bias, theta, kernel, num_heads, window_size):
        ctx.save_for_backward(qkv, bias, theta, kernel)
        ctx.given = num_heads, window_size
        height, width = qkv.shape[1:3]
        padded = pad_to_blocks(qkv, window_size)
        out = [
            _attend(part, bias, theta, kernel, *ctx.given, (height, width), first)
            for part, first in parts_of(padded, *ctx.given)
        ]
        return torch.cat(out, 1)[:, :height, :width].contiguous()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        qkv, *others = ctx.saved_tensors
        (height, width), (rows, columns) = qkv.shape[1:3], ctx.given[1]
        padded = pad_to_blocks(qkv, ctx.given[1])
        grad = F.pad(grad, (0, 0, 0, -width % columns, 0, -height % rows))
        leaves = [t if t is None else t.detach().requires_grad_() for t in others]
        # In float32 at least: the sums are over the whole map, and parts overlap.
        kind = torch.promote_types(qkv.dtype, torch.float32)
        total = torch.zeros_like(padded, dtype=kind)
        sums = [t if t is None else torch.zeros_like(t, dtype=kind) for t in others]
        for part, first in parts_of(padded, *ctx.given):
            leaf, top = part.detach().requires_grad_(), first * rows
            with torch.enable_grad():
                out = _attend(leaf, *leaves, *ctx.given, (height, width), first)
            wanted = [t for t in (leaf, *leaves) if t is not None]
            own, *found = torch.autograd.grad(out, wanted, grad[:, top : top + out.shape[1]])
            total[:, top : top + part.shape[1]] += own
            for part_sum, value in zip((s for s in sums if s is not None), found, strict=True):
                part_sum += value
        up, left = rows // 2, columns // 2
        own = total[:, up : up + height, left : left + width].to(qkv.dtype).contiguous()
        return own, *(s if s is None else s.to(grad.dtype) for s in sums), None, None


@constant
def _shifts(rows: int, columns: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """``(9, N, N)``: the matrix of each tap of a circular 3x3 convolution, from n to m."""
    places = torch.eye(rows * columns, device=device, dtype=dtype).unflatten(1, (rows, columns))
    taps = [torch.roll(places, (1 - y, 1 - x), (1, 2)) for y in range(3) for x in range(3)]
    return torch.stack(taps).flatten(2)
