"""Static and dynamic depth-wise convolution: forward, map gradient and weight gradient.

Arguments of the kernels: ``x``, ``grad`` and ``out`` are maps ``(B, H, W, C)``; ``taps`` is
``(B or 1, K*K, C)``, ``step`` the elements from one image's taps to the next image's (0 if shared);
``before`` is the zero padding before each axis; ``flip`` reverses the taps, for the map gradient;
``bucket`` only keys the autotuner. A program has a tile of BLOCK_W positions of a row and BLOCK_C
channels.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from backbones.ops.triton_kernels import (
    CHANGING,
    added,
    divisor,
    launches,
    located,
    parts,
    power,
    span,
    visible,
)
from backbones.ops.triton_kernels.tuning import bucket, run, tile


@triton.jit(do_not_specialize=CHANGING)
def _forward(
    x, taps, bias, out, H, W, C, step, bucket, K: tl.constexpr, before: tl.constexpr,
    flip: tl.constexpr, biased: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """``out[p] = bias + sum over taps of x[p + tap] * taps[tap]`` for one tile."""
    row, left, block = located(W, tl.cdiv(C, BLOCK_C), BLOCK_W)
    columns = left + tl.arange(0, BLOCK_W)
    channels = block * BLOCK_C + tl.arange(0, BLOCK_C)
    image, y = (row // H).to(tl.int64), row % H
    real = channels < C
    total = tl.full((BLOCK_W, BLOCK_C), 0.0, tl.float32)
    if biased:
        total += tl.load(bias + channels, real, 0.0).to(tl.float32)[None]
    for u in range(K):
        from_y = y + u - before
        for v in range(K):
            from_x = columns + v - before
            inside = ((from_x >= 0) & (from_x < W) & (from_y >= 0) & (from_y < H)) != 0
            places = ((image * H + from_y) * W + from_x)[:, None] * C + channels[None]
            values = tl.load(x + places, inside[:, None] & real[None], 0.0)
            tap = u * K + v
            tap = K * K - 1 - tap if flip else tap
            weight = tl.load(taps + image * step + tap * C + channels, real, 0.0)
            total += values.to(tl.float32) * weight.to(tl.float32)[None]
    places = ((image * H + y) * W + columns)[:, None] * C + channels[None]
    tl.store(out + places, total.to(out.dtype.element_ty), (columns < W)[:, None] & real[None])


@triton.jit(do_not_specialize=CHANGING)
def _weight_gradient(
    x, grad, out, H, W, C, rows, chunks, shared, K: tl.constexpr, before: tl.constexpr,
    TAPS: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """``sum of x[p + tap] * grad[p]`` for the taps of one kernel row, ``grad`` read once for them.

    A program sums one of ``chunks`` chunks of ``rows``, counted through all images that share the
    taps, ``shared`` in a row. TAPS covers K.
    """
    blocks = tl.cdiv(C, BLOCK_C)
    # Programs of the same positions follow each other, so that the cache has them.
    part, u = tl.program_id(0) // blocks // K, tl.program_id(0) // blocks % K
    channels = tl.program_id(0) % blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    kernel, chunk = part // chunks, part % chunks
    real, v = channels < C, tl.arange(0, TAPS)
    total = tl.full((BLOCK_W, TAPS, BLOCK_C), 0.0, tl.float32)
    first, last = span(chunk, chunks, rows)
    # Tiles go on from row to row: those of a narrow map are full, too.
    for start in range(0, (last - first) * W, BLOCK_W):
        place = start + tl.arange(0, BLOCK_W)
        row, column = first + place // W, place % W
        image, y = (kernel * shared + row // H).to(tl.int64), row % H
        from_y, from_x = y + u - before, column[:, None] + v[None] - before
        here = row < last
        seen = here & (from_y >= 0) & (from_y < H)
        inside = seen[:, None] & (v < K)[None] & (from_x >= 0) & (from_x < W)
        own = (image * H + y) * W + column
        moved = own[:, None] + (u - before) * W + v[None] - before
        given = tl.load(grad + own[:, None] * C + channels[None], here[:, None] & real[None], 0.0)
        values = tl.load(
            x + moved[:, :, None] * C + channels[None, None],
            inside[:, :, None] & real[None, None],
            0.0,
        )
        total += values.to(tl.float32) * given.to(tl.float32)[:, None, :]
    place = ((part.to(tl.int64) * K + u) * K + v)[:, None] * C + channels[None]
    tl.store(out + place, tl.sum(total, 0), (v < K)[:, None] & real[None])


@launches
def convolve(
    x: Tensor, taps: Tensor, bias: Tensor | None, size: int, before: int, flip: bool
) -> Tensor:
    """Convolve ``(B, H, W, C)`` with taps ``(B or 1, K*K, C)``."""
    out = torch.empty_like(x)
    batch, height, width, channels = x.shape
    if not out.numel():
        return out
    step = taps[0].numel() if taps.shape[0] > 1 else 0

    def grid(tile: dict) -> tuple[int]:
        blocks = triton.cdiv(channels, tile["BLOCK_C"])
        return (batch * height * triton.cdiv(width, tile["BLOCK_W"]) * blocks,)

    run(
        _forward, grid, tiles(width, channels),
        x, taps, bias if bias is not None else x, out, height, width, channels, step, bucket(x),
        size, before, flip, bias is not None,
    )  # fmt: skip
    return out


@launches
def weight_gradient(x: Tensor, grad: Tensor, kernels: int, size: int, before: int) -> Tensor:
    """``(kernels, K*K, C)`` in float32, ``kernels`` being 1 or B."""
    batch, height, width, channels = x.shape
    if not x.numel():
        return x.new_zeros(kernels, size**2, channels, dtype=torch.float32)
    shared = 1 if kernels > 1 else batch
    rows = shared * height
    numel, read = size**2 * channels * kernels, 2 * x.numel() * x.element_size()
    chunks = parts(rows, numel, read)
    block_c = divisor(channels, 32, 32)
    out = x.new_empty(kernels, chunks, size**2, channels, dtype=torch.float32)
    grid = (kernels * chunks * size * triton.cdiv(channels, block_c),)
    visible(_weight_gradient)[grid](
        x, grad, out, height, width, channels, rows, chunks, shared, size, before,
        TAPS=power(size, 1), BLOCK_W=32, BLOCK_C=block_c,
    )  # fmt: skip
    return added(out, 1)


def tiles(width: int, channels: int) -> tuple[triton.Config, ...]:
    """The tiles to time."""
    sides = [(min(16, power(width, 1)), divisor(channels, 32, 64))]
    sides += [(8, 64), (32, 64), (16, 128), (32, 32)]
    return tuple(tile(BLOCK_W=w, BLOCK_C=c) for w, c in dict.fromkeys(sides))
