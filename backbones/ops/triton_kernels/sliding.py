"""Sliding attention: a program has some positions of one head and goes through their windows.

Positions are those of all images in a row, so that no tile is partly empty on small maps. A key is
multiplied elementwise: matrix products would take a halo of keys that most queries do not see. The
softmax is online. The backward pass stores the largest score of a position, ``top``, its share of
the weights, ``share``, and the mean of their gradients, ``mean``, each ``(B, H, W, heads)`` in
float32.

Arguments of the kernels: ``qkv`` is ``(B, H, W, 3 * heads * D)``, ``out`` and ``grad``
``(B, H, W, heads * D)``, ``bias`` ``(heads, N)``; M is B*H*W, N the positions of a window of
``columns`` columns, ``up`` and ``left`` go from its centre to its border; ``scale`` is ``D**-0.5``.
BLOCK_P positions make a tile, BLOCK_D covers D and BLOCK_N covers N.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from backbones.ops.triton_kernels import CHANGING, added, launches, parts, power, span, visible

# Elements of a tile: queries, gradients and sums of 4 warps fit their registers.
_ELEMENTS = 2048


@triton.jit
def _beside(p, M, H, W, dy, dx):
    """The positions at an offset, and whether they are on the map of the same image."""
    y, x = p // W % H + dy, p % W + dx
    inside = (p < M) & (y >= 0) & (y < H) & (x >= 0) & (x < W)
    return p + dy * W + dx, inside


@triton.jit
def _load(map, p, inside, channels, first, D, BLOCK_D: tl.constexpr):
    """D channels from ``first`` of some positions, zero outside, ``(BLOCK_P, BLOCK_D)``."""
    d = tl.arange(0, BLOCK_D)
    at = p.to(tl.int64)[:, None] * channels + (first + d)[None]
    return tl.load(map + at, inside[:, None] & (d < D)[None], 0.0).to(tl.float32)


@triton.jit
def _store(map, p, inside, channels, first, D, value, BLOCK_D: tl.constexpr):
    d = tl.arange(0, BLOCK_D)
    at = p.to(tl.int64)[:, None] * channels + (first + d)[None]
    tl.store(map + at, value.to(map.dtype.element_ty), inside[:, None] & (d < D)[None])


@triton.jit(do_not_specialize=CHANGING)
def _forward(
    qkv, bias, out, M, H, W, heads, D, N, columns, up, left, scale,
    BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    head, C = tl.program_id(1), heads * D
    p = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    query = _load(qkv, p, p < M, 3 * C, head * D, D, BLOCK_D) * scale
    largest = tl.full((BLOCK_P,), float("-inf"), tl.float32)
    total = tl.full((BLOCK_P,), 0.0, tl.float32)
    mixed = tl.full((BLOCK_P, BLOCK_D), 0.0, tl.float32)
    for n in range(N):
        there, inside = _beside(p, M, H, W, n // columns - up, n % columns - left)
        key = _load(qkv, there, inside, 3 * C, C + head * D, D, BLOCK_D)
        value = _load(qkv, there, inside, 3 * C, 2 * C + head * D, D, BLOCK_D)
        score = tl.sum(query * key, 1) + tl.load(bias + head * N + n).to(tl.float32)
        score = tl.where(inside, score, float("-inf"))
        more = tl.maximum(largest, score)
        # Until a position is inside, all that was seen is zero.
        fewer = tl.where(more == float("-inf"), 0.0, tl.exp(largest - more))
        weight = tl.where(inside, tl.exp(score - more), 0.0)
        largest, total = more, total * fewer + weight
        mixed = mixed * fewer[:, None] + weight[:, None] * value
    mixed /= tl.where(p < M, total, 1.0)[:, None]
    _store(out, p, p < M, C, head * D, D, mixed, BLOCK_D)


@triton.jit(do_not_specialize=CHANGING)
def _query_gradient(
    grad, qkv, bias, grad_qkv, grad_bias, top, share, mean, M, chunks, H, W, heads, D, N, columns,
    up, left, scale, BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Of one of ``chunks`` chunks of positions; gradients of the bias summed over them."""
    chunk, head, C = tl.program_id(0), tl.program_id(1), heads * D
    offsets = tl.arange(0, BLOCK_N)
    sums = tl.full((BLOCK_N,), 0.0, tl.float32)
    first, last = span(chunk, chunks, tl.cdiv(M, BLOCK_P))
    for block in range(first, last):
        p = block * BLOCK_P + tl.arange(0, BLOCK_P)
        query = _load(qkv, p, p < M, 3 * C, head * D, D, BLOCK_D) * scale
        given = _load(grad, p, p < M, C, head * D, D, BLOCK_D)
        largest = tl.full((BLOCK_P,), float("-inf"), tl.float32)
        total = tl.full((BLOCK_P,), 0.0, tl.float32)
        weighted = tl.full((BLOCK_P,), 0.0, tl.float32)
        for n in range(N):
            there, inside = _beside(p, M, H, W, n // columns - up, n % columns - left)
            key = _load(qkv, there, inside, 3 * C, C + head * D, D, BLOCK_D)
            value = _load(qkv, there, inside, 3 * C, 2 * C + head * D, D, BLOCK_D)
            score = tl.sum(query * key, 1) + tl.load(bias + head * N + n).to(tl.float32)
            score = tl.where(inside, score, float("-inf"))
            more = tl.maximum(largest, score)
            fewer = tl.where(more == float("-inf"), 0.0, tl.exp(largest - more))
            weight = tl.where(inside, tl.exp(score - more), 0.0)
            largest, total = more, total * fewer + weight
            weighted = weighted * fewer + weight * tl.sum(given * value, 1)
        part = 1 / tl.where(p < M, total, 1.0)
        average = weighted * part
        at = p.to(tl.int64) * heads + head
        tl.store(top + at, largest, p < M)
        tl.store(share + at, part, p < M)
        tl.store(mean + at, average, p < M)
        result = tl.full((BLOCK_P, BLOCK_D), 0.0, tl.float32)
        for n in range(N):
            there, inside = _beside(p, M, H, W, n // columns - up, n % columns - left)
            key = _load(qkv, there, inside, 3 * C, C + head * D, D, BLOCK_D)
            value = _load(qkv, there, inside, 3 * C, 2 * C + head * D, D, BLOCK_D)
            score = tl.sum(query * key, 1) + tl.load(bias + head * N + n).to(tl.float32)
            weight = tl.where(inside, tl.exp(score - largest) * part, 0.0)
            grad_score = weight * (tl.sum(given * value, 1) - average)
            result += grad_score[:, None] * key
            sums += tl.where(offsets == n, tl.sum(grad_score, 0), 0.0)
        _store(grad_qkv, p, p < M, 3 * C, head * D, D, result * scale, BLOCK_D)
    tl.store(grad_bias + (chunk * heads + head) * N + offsets, sums, offsets < N)


@triton.jit(do_not_specialize=CHANGING)
def _key_gradient(
    grad, qkv, bias, grad_qkv, top, share, mean, M, H, W, heads, D, N, columns, up, left, scale,
    BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Gradients of keys and values, from the queries whose windows they are in."""
    head, C = tl.program_id(1), heads * D
    p = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    key = _load(qkv, p, p < M, 3 * C, C + head * D, D, BLOCK_D) * scale
    value = _load(qkv, p, p < M, 3 * C, 2 * C + head * D, D, BLOCK_D)
    grad_key = tl.full((BLOCK_P, BLOCK_D), 0.0, tl.float32)
    grad_value = tl.full((BLOCK_P, BLOCK_D), 0.0, tl.float32)
    for n in range(N):
        # A key at an offset from its query: the query is at the opposite one.
        there, inside = _beside(p, M, H, W, up - n // columns, left - n % columns)
        query = _load(qkv, there, inside, 3 * C, head * D, D, BLOCK_D)
        given = _load(grad, there, inside, C, head * D, D, BLOCK_D)
        at = there.to(tl.int64) * heads + head
        largest, part = tl.load(top + at, inside, 0.0), tl.load(share + at, inside, 0.0)
        average = tl.load(mean + at, inside, 0.0)
        score = tl.sum(query * key, 1) + tl.load(bias + head * N + n).to(tl.float32)
        weight = tl.where(inside, tl.exp(score - largest) * part, 0.0)
        grad_value += weight[:, None] * given
        grad_score = weight * (tl.sum(given * value, 1) - average)
        grad_key += grad_score[:, None] * query
    _store(grad_qkv, p, p < M, 3 * C, C + head * D, D, grad_key * scale, BLOCK_D)
    _store(grad_qkv, p, p < M, 3 * C, 2 * C + head * D, D, grad_value, BLOCK_D)


@launches
def forward(qkv: Tensor, bias: Tensor, num_heads: int, window_size: list[int]) -> Tensor:
    """Attention of qkv ``(B, H, W, 3*C)`` with bias ``(heads, N)``: ``(B, H, W, C)``."""
    out = qkv.new_empty(*qkv.shape[:3], qkv.shape[3] // 3)
    positions, sizes, blocks = _options(qkv, num_heads, window_size)
    if positions:
        grid = triton.cdiv(positions, blocks["BLOCK_P"]), num_heads
        visible(_forward)[grid](qkv, bias, out, positions, *sizes, **blocks)
    return out


@launches
def backward(
    grad: Tensor, qkv: Tensor, bias: Tensor, num_heads: int, window_size: list[int]
) -> tuple[Tensor, Tensor]:
    """The gradients of ``qkv`` and, in float32, of ``bias``."""
    positions, sizes, blocks = _options(qkv, num_heads, window_size)
    tiles = triton.cdiv(positions, blocks["BLOCK_P"])
    grad_qkv = torch.empty_like(qkv)
    chunks = parts(tiles, bias.numel())
    grad_bias = bias.new_zeros(chunks, *bias.shape, dtype=torch.float32)
    if positions:
        shape = *qkv.shape[:3], num_heads
        stored = [qkv.new_empty(shape, dtype=torch.float32) for _ in range(3)]
        maps = grad, qkv, bias, grad_qkv
        visible(_query_gradient)[(chunks, num_heads)](
            *maps, grad_bias, *stored, positions, chunks, *sizes,
            **blocks, BLOCK_N=power(bias.shape[1]),
        )  # fmt: skip
        visible(_key_gradient)[(tiles, num_heads)](*maps, *stored, positions, *sizes, **blocks)
    return grad_qkv, added(grad_bias, 0)


def _options(qkv: Tensor, num_heads: int, window_size: list[int]):
    batch, height, width, channels = qkv.shape
    depth, (rows, columns) = channels // (3 * num_heads), window_size
    block_d = power(depth, 1)
    blocks = {"BLOCK_P": max(1, min(128, _ELEMENTS // block_d)), "BLOCK_D": block_d}
    sizes = (
        height, width, num_heads, depth, rows * columns, columns, rows // 2, columns // 2,
        depth**-0.5,
    )  # fmt: skip
    return batch * height * width, sizes, blocks
