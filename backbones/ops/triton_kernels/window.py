"""Attention inside shifted windows; roll and partition are index arithmetic.

Arguments of the kernels: ``qkv`` is ``(B, H, W, 3 * heads * D)``, ``out`` and ``grad``
``(B, H, W, heads * D)``, ``bias`` ``(heads, N, N)``. ``rows`` and ``columns`` are the window size,
``down`` and ``right`` the shift, N the positions of a window; ``scale`` is ``D**-0.5``; ``bucket``
only keys the autotuner. BLOCK_N covers N, BLOCKS blocks of BLOCK_D cover D, and DOT is the dtype of
``tl.dot`` operands. A program has one head; the backward pass computes the attention weights again.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from backbones.ops.triton_kernels import (
    CHANGING,
    added,
    launches,
    operands,
    parts,
    power,
    span,
    visible,
)
from backbones.ops.triton_kernels.tuning import bucket, run, tile

# Of the backward pass. Three 64x64 tiles exceed the registers of 4 warps, and with the windows of
# two iterations in flight float32 exceeds the 99 KB of shared memory of a consumer GPU.
BACKWARD = {"num_warps": 8, "num_stages": 1}
# The forward pass tunes num_warps only.
FORWARD = tile(4), tile(8)
# Channels of a head in a block: more of them and float32 exceeds the shared memory, too.
_DEPTH = 32


@triton.jit
def _places(window, H, W, rows, columns, down, right, N, BLOCK_N: tl.constexpr):
    """Indices into ``B*H*W`` of a window's positions, and on which sides of the seam they are."""
    across = W // columns
    windows = H // rows * across
    image, window = (window // windows).to(tl.int64), window % windows
    n = tl.arange(0, BLOCK_N)
    y = window // across * rows + n // columns
    x = window % across * columns + n % columns
    # Only the last windows of an axis have positions that the roll wrapped around.
    side = tl.where(y >= H - down, 1, 0) + tl.where(x >= W - right, 2, 0)
    y, x = (y + down) % H, (x + right) % W
    return (image * H + y) * W + x, side


@triton.jit
def _table(bias, head, N, BLOCK_N: tl.constexpr):
    """The bias of a head, ``(BLOCK_N, BLOCK_N)``, zero in the padding."""
    n = tl.arange(0, BLOCK_N)
    place = (head * N + n)[:, None] * N + n[None]
    return tl.load(bias + place, (n < N)[:, None] & (n < N)[None], 0.0).to(tl.float32)


@triton.jit
def _attend(products, table, side, N, scale, BLOCK_N: tl.constexpr):
    """``softmax(products * scale + table)``, zero across the seam and in the padding."""
    n = tl.arange(0, BLOCK_N)
    scores = products * scale + table
    # Padding rows are not masked, so that no sum of weights is zero.
    seen = ((side[:, None] == side[None]) | (n >= N)[:, None]) & (n < N)[None]
    scores = tl.where(seen, scores, float("-inf"))
    weights = tl.exp(scores - tl.max(scores, 1)[:, None])
    return tl.where((n < N)[:, None], weights / tl.sum(weights, 1)[:, None], 0.0)


@triton.jit(do_not_specialize=CHANGING)
def _forward(
    qkv, bias, out, H, W, heads, D, rows, columns, down, right, N, scale, bucket,
    BLOCKS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    window, head = tl.program_id(0), tl.program_id(1)
    places, side = _places(window, H, W, rows, columns, down, right, N, BLOCK_N)
    n = tl.arange(0, BLOCK_N)
    C = heads * D
    products = tl.full((BLOCK_N, BLOCK_N), 0.0, tl.float32)
    for block in range(BLOCKS):
        d = block * BLOCK_D + tl.arange(0, BLOCK_D)
        real = (n < N)[:, None] & (d < D)[None]
        at = places[:, None] * 3 * C + (head * D + d)[None]
        query = tl.load(qkv + at, real, 0.0).to(DOT)
        key = tl.load(qkv + at + C, real, 0.0).to(DOT)
        products += tl.dot(query, tl.trans(key), input_precision="ieee")
    table = _table(bias, head, N, BLOCK_N)
    weights = _attend(products, table, side, N, scale, BLOCK_N).to(DOT)
    for block in range(BLOCKS):
        d = block * BLOCK_D + tl.arange(0, BLOCK_D)
        real = (n < N)[:, None] & (d < D)[None]
        at = places[:, None] * 3 * C + (head * D + d)[None]
        value = tl.load(qkv + at + 2 * C, real, 0.0).to(DOT)
        result = tl.dot(weights, value, input_precision="ieee")
        at = places[:, None] * C + (head * D + d)[None]
        tl.store(out + at, result.to(out.dtype.element_ty), real)


@triton.jit(do_not_specialize=CHANGING)
def _backward(
    grad, qkv, bias, grad_qkv, grad_bias, windows, chunks, H, W, heads, D, rows, columns,
    down, right, N, scale,
    BLOCKS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """Gradients of one head of one of ``chunks`` chunks of ``windows``; bias gradients summed."""
    chunk, head = tl.program_id(0), tl.program_id(1)
    n = tl.arange(0, BLOCK_N)
    C = heads * D
    kind = grad_qkv.dtype.element_ty
    total, table = tl.full((BLOCK_N, BLOCK_N), 0.0, tl.float32), _table(bias, head, N, BLOCK_N)
    first, last = span(chunk, chunks, windows)
    for window in range(first, last):
        places, side = _places(window, H, W, rows, columns, down, right, N, BLOCK_N)
        products = tl.full((BLOCK_N, BLOCK_N), 0.0, tl.float32)
        grad_weights = tl.full((BLOCK_N, BLOCK_N), 0.0, tl.float32)
        for block in range(BLOCKS):
            d = block * BLOCK_D + tl.arange(0, BLOCK_D)
            real = (n < N)[:, None] & (d < D)[None]
            at = places[:, None] * 3 * C + (head * D + d)[None]
            query = tl.load(qkv + at, real, 0.0).to(DOT)
            key = tl.load(qkv + at + C, real, 0.0).to(DOT)
            value = tl.load(qkv + at + 2 * C, real, 0.0).to(DOT)
            at = places[:, None] * C + (head * D + d)[None]
            given = tl.load(grad + at, real, 0.0).to(DOT)
            products += tl.dot(query, tl.trans(key), input_precision="ieee")
            grad_weights += tl.dot(given, tl.trans(value), input_precision="ieee")
        weights = _attend(products, table, side, N, scale, BLOCK_N)
        mean = tl.sum(weights * grad_weights, 1)
        grad_scores = weights * (grad_weights - mean[:, None])
        total += grad_scores
        weights, grad_scores = weights.to(DOT), grad_scores.to(DOT)
        for block in range(BLOCKS):
            d = block * BLOCK_D + tl.arange(0, BLOCK_D)
            real = (n < N)[:, None] & (d < D)[None]
            at = places[:, None] * C + (head * D + d)[None]
            given = tl.load(grad + at, real, 0.0).to(DOT)
            at = places[:, None] * 3 * C + (head * D + d)[None]
            query = tl.load(qkv + at, real, 0.0).to(DOT)
            key = tl.load(qkv + at + C, real, 0.0).to(DOT)
            grad_value = tl.dot(tl.trans(weights), given, input_precision="ieee")
            grad_query = tl.dot(grad_scores, key, input_precision="ieee") * scale
            grad_key = tl.dot(tl.trans(grad_scores), query, input_precision="ieee") * scale
            tl.store(grad_qkv + at, grad_query.to(kind), real)
            tl.store(grad_qkv + at + C, grad_key.to(kind), real)
            tl.store(grad_qkv + at + 2 * C, grad_value.to(kind), real)
    square = (n < N)[:, None] & (n < N)[None]
    place = ((chunk * heads + head) * N + n)[:, None] * N + n[None]
    tl.store(grad_bias + place, total, square)


@launches
def forward(
    qkv: Tensor, bias: Tensor, num_heads: int, window_size: list[int], shift: list[int]
) -> Tensor:
    """Attention of qkv ``(B, H, W, 3*C)`` with bias ``(heads, N, N)``: ``(B, H, W, C)``."""
    batch, height, width, channels = qkv.shape
    out = qkv.new_empty(batch, height, width, channels // 3)
    windows, sizes, blocks = _options(qkv, num_heads, window_size, shift)
    if windows:
        grid = windows, num_heads
        run(_forward, lambda tile: grid, FORWARD, qkv, bias, out, *sizes, bucket(qkv), **blocks)
    return out


@launches
def backward(
    grad: Tensor,
    qkv: Tensor,
    bias: Tensor,
    num_heads: int,
    window_size: list[int],
    shift: list[int],
) -> tuple[Tensor, Tensor]:
    """The gradients of ``qkv`` and, in float32, of ``bias``."""
    windows, sizes, blocks = _options(qkv, num_heads, window_size, shift)
    grad_qkv = torch.empty_like(qkv)
    chunks = parts(windows, bias.numel())
    grad_bias = bias.new_zeros(chunks, *bias.shape, dtype=torch.float32)
    if windows:
        visible(_backward)[(chunks, num_heads)](
            grad, qkv, bias, grad_qkv, grad_bias, windows, chunks, *sizes, **blocks, **BACKWARD
        )
    return grad_qkv, added(grad_bias, 0)


def _options(qkv: Tensor, num_heads: int, window_size: list[int], shift: list[int]):
    batch, height, width, channels = qkv.shape
    positions, depth = window_size[0] * window_size[1], channels // (3 * num_heads)
    windows = batch * (height // window_size[0]) * (width // window_size[1])
    block_d = min(_DEPTH, power(depth))
    blocks = {
        "BLOCKS": triton.cdiv(depth, block_d),
        "BLOCK_N": power(positions),
        "BLOCK_D": block_d,
        "DOT": operands(qkv.dtype),
    }
    sizes = (height, width, num_heads, depth, *window_size, *shift, positions, depth**-0.5)
    return windows, sizes, blocks
