"""Sliding attention: each position attends to the window centred at it (Table 5).

The C and Triton kernels store the attention weights of one row or tile of positions, which the
backward pass computes again. The torch backend takes blocks of queries of the window's size, with
the keys and values of the block and half a window around it (7x7 queries and 13x13 keys), a few
blocks at a time.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from backbones.ops import native, reference
from backbones.ops.common import (
    autocast_dtype,
    register_backward,
    triton_kernels,
    without_autocast,
)
from backbones.ops.dispatch import attempt, choose, exporting, operator
from backbones.ops.halos import (
    add_halos,
    hidden_keys,
    pad_to_blocks,
    parts_of,
    take_blocks,
    window_keys,
    window_offsets,
)
from backbones.ops.windows import Size, partition, reverse

_NAME = "sliding_attention"
# Strips of rows times heads and images in the C kernels: enough tasks for many threads.
_TASKS = 64


def sliding_attention(qkv: Tensor, bias: Tensor, num_heads: int, window_size: Size) -> Tensor:
    """Multi-head self-attention of each position to the window centred at it.

    ``softmax(q_i k_{i+d} / sqrt(C / heads) + bias[d])`` over the offsets d of the window that stay
    inside the map, times ``v_{i+d}``. H and W are any; nothing is padded.

    >>> sliding_attention(torch.ones(1, 5, 4, 24), torch.zeros(2, 9), 2, (3, 3)).shape
    torch.Size([1, 5, 4, 8])

    Args:
        qkv: ``(B, H, W, 3*C)``, query, key and value concatenated, each head-major.
        bias: ``(heads, rows*columns)``, one number for each offset from query to key, row by row,
            the first for the key up left. In Swin's table these are the offsets of a window's
            centre, :func:`backbones.ops.windows.sliding_position_index`.
        num_heads: number of heads.
        window_size: rows and columns of a window, odd.

    Returns:
        ``(B, H, W, C)`` in the dtype of ``qkv``, or of autocast if it is on.

    Raises:
        ValueError: the window has an even side, or ``bias`` has another shape.
    """
    rows, columns = window_size
    if rows % 2 == 0 or columns % 2 == 0:
        raise ValueError(f"window_size={(rows, columns)}: a centred window has odd sides")
    if bias.shape != (num_heads, rows * columns):
        raise ValueError(
            f"bias of {tuple(bias.shape)} for {num_heads} heads and windows of {rows}x{columns}: "
            f"expected {(num_heads, rows * columns)}"
        )
    backend = choose(_NAME, qkv, bias)
    qkv = qkv.to(autocast_dtype(qkv))
    with without_autocast(qkv):
        if exporting():
            return _attend_blocks(qkv, bias, num_heads, window_size)
        if backend == "reference":
            return reference.sliding_attention(qkv, bias, num_heads, window_size)
        # The operator chooses its backend when it runs, so a compiled graph fixes none.
        return torch.ops.dense.sliding_attention(qkv, bias, num_heads, [rows, columns])


@operator("sliding_attention", _NAME)
def _attend(qkv: Tensor, bias: Tensor, num_heads: int, window_size: list[int]) -> Tensor:
    backend, given = choose(_NAME, qkv), (num_heads, window_size)
    if backend == "triton":
        args = qkv.contiguous(), bias.contiguous(), *given
        out = attempt(_NAME, lambda: triton_kernels("sliding").forward(*args))
        if out is not None:
            return out
    if backend != "native":
        return _plain(qkv, bias, *given)
    qkv_ = native.maps(qkv)
    out = qkv_.new_empty(*qkv.shape[:3], qkv.shape[3] // 3)
    weights = native.weights(qkv.dtype, bias)
    native.call("sliding_attention", (qkv_, out), weights, _sizes(out, *given))
    return out.to(qkv.dtype)


@operator("sliding_attention_backward", _NAME)
def _attend_backward(
    grad: Tensor, qkv: Tensor, bias: Tensor, num_heads: int, window_size: list[int]
) -> tuple[Tensor, Tensor]:
    backend, given = choose(_NAME, qkv), (num_heads, window_size)
    if backend == "triton":
        args = grad.contiguous(), qkv.contiguous(), bias.contiguous(), *given
        own = attempt(_NAME, lambda: triton_kernels("sliding").backward(*args))
        if own is not None:
            return own[0], own[1].to(bias.dtype)
    if backend != "native":
        return _plain_backward(grad, qkv, bias, *given)
    qkv_, grad_ = native.maps(qkv, grad)
    (bias_,) = native.weights(qkv.dtype, bias)
    sizes = _sizes(grad, *given)
    parts = bias_.new_empty(grad.shape[0] * sizes[0], *bias.shape)
    grad_qkv = torch.zeros_like(qkv_)
    maps = grad_, qkv_, grad_qkv
    native.call("sliding_attention_backward", maps, (bias_, parts), sizes)
    return grad_qkv.to(qkv.dtype), parts.sum(0).to(bias.dtype)


def _sizes(like: Tensor, num_heads: int, window_size: list[int]) -> list[int]:
    """Strips, B, H, W, heads, channels of a head, window size."""
    batch, height, width, channels = like.shape
    wanted = max(1, _TASKS // max(1, batch * num_heads))
    # In the backward pass a strip needs the rows that it shares with the strips beside it.
    strips = max(1, min(wanted, height // max(1, window_size[0] - 1)))
    return [strips, batch, height, width, num_heads, channels // num_heads, *window_size]


@_attend.register_fake
def _(qkv: Tensor, bias: Tensor, num_heads: int, window_size: list[int]):
    return qkv.new_empty(*qkv.shape[:3], qkv.shape[3] // 3)


@_attend_backward.register_fake
def _(grad: Tensor, qkv: Tensor, bias: Tensor, num_heads: int, window_size: list[int]):
    return qkv.new_empty(qkv.shape), bias.new_empty(bias.shape)


register_backward(_attend, torch.ops.dense.sliding_attention_backward)


# Blocks of queries


def _plain(qkv: Tensor, bias: Tensor, num_heads: int, window_size: Size) -> Tensor:
    height, width = qkv.shape[1:3]
    padded, table = pad_to_blocks(qkv, window_size), _table(bias.to(qkv.dtype), window_size)
    out = [
        _attend_block_rows(part, table, num_heads, window_size, (height, width), first)
        for part, first in parts_of(padded, num_heads, window_size)
    ]
    return torch.cat(out, 1)[:, :height, :width].contiguous()


def _attend_blocks(qkv: Tensor, bias: Tensor, num_heads: int, window_size: Size) -> Tensor:
    """For export: all blocks at once."""
    height, width = qkv.shape[1:3]
    padded, table = pad_to_blocks(qkv, window_size), _table(bias.to(qkv.dtype), window_size)
    out = _attend_block_rows(padded, table, num_heads, window_size, (height, width), 0)
    return out[:, :height, :width]


def _attend_block_rows(
    part: Tensor, table: Tensor, num_heads: int, window_size: Size, size: Size, first: int
) -> Tensor:
    """``(B, n*rows, W, C)`` of n rows of blocks, the first of which is ``first``."""
    query, key, value = take_blocks(part, num_heads, window_size)
    hidden = hidden_keys(query, window_size, size, first)
    return reverse(_weights(query, key, table, hidden) @ value.mT, window_size)


def _plain_backward(
    grad: Tensor, qkv: Tensor, bias: Tensor, num_heads: int, window_size: Size
) -> tuple[Tensor, Tensor]:
    """The gradients of :func:`_plain` by formula: nothing is recorded in an operator."""
    (height, width), (rows, columns) = qkv.shape[1:3], window_size
    padded, table = pad_to_blocks(qkv, window_size), _table(bias.to(qkv.dtype), window_size)
    up, left = rows // 2, columns // 2
    grads = F.pad(grad, (0, 0, 0, -width % columns, 0, -height % rows))
    # In float32 at least, because halos overlap: a row and a column of blocks more than there are.
    kind = torch.promote_types(qkv.dtype, torch.float32)
    shape = list(padded.shape)
    total = padded.new_zeros(shape[0], shape[1] + 1, shape[2] + 1, shape[3], dtype=kind)
    total_bias = torch.zeros_like(table, dtype=kind)
    for part, first in parts_of(padded, num_heads, window_size):
        query, key, value = take_blocks(part, num_heads, window_size)
        hidden = hidden_keys(query, window_size, (height, width), first)
        weights = _weights(query, key, table, hidden)
        top, count = first * rows, query.shape[1] * rows
        given = partition(grads[:, top : top + count], window_size, num_heads)
        grad_value = given.mT @ weights
        grad_weights = given @ value
        grad_scores = torch._softmax_backward_data(grad_weights, weights, -1, weights.dtype)
        total_bias += grad_scores.sum((0, 1, 2))
        scale = query.shape[-1] ** -0.5
        grad_key = query.mT @ grad_scores * scale
        grad_query = reverse(grad_scores @ key.mT * scale, window_size)
        channels = grad.shape[-1]
        own = total[:, top + up : top + up + count, left : left + grads.shape[2]]
        own[..., :channels] += grad_query
        beside = total[:, top : top + count + rows]
        add_halos(beside[..., channels : 2 * channels], grad_key, window_size)
        add_halos(beside[..., 2 * channels :], grad_value, window_size)
    grad_qkv = total[:, up : up + height, left : left + width].to(qkv.dtype).contiguous()
    return grad_qkv, _table_gradient(total_bias, window_size).to(bias.dtype)


def _weights(query: Tensor, key: Tensor, table: Tensor, hidden: Tensor) -> Tensor:
    """``(B, nH, nW, heads, N, M)`` attention weights."""
    scores = query * query.shape[-1] ** -0.5 @ key
    scores += table
    # Not -infinity: a query in the padding may see nothing else, and must not become NaN.
    return scores.masked_fill_(hidden, torch.finfo(scores.dtype).min).softmax(-1)


def _table(bias: Tensor, window_size: Size) -> Tensor:
    """``(heads, N, M)``: the bias of a query and a key of its halo, -infinity for none."""
    outside = bias.new_full((bias.shape[0], 1), float("-inf"))
    index = window_offsets(*window_size, bias.device)
    return torch.cat((bias, outside), 1)[:, index.flatten()].unflatten(1, index.shape)


def _table_gradient(grad: Tensor, window_size: Size) -> Tensor:
    """The gradient of the bias, ``(heads, rows*columns)``, from that of :func:`_table`."""
    keys = window_keys(*window_size, grad.device)
    return grad.gather(-1, keys.expand(len(grad), -1, -1)).sum(1)
