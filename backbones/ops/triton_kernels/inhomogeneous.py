"""Depth-wise convolution with kernels predicted at every position; the kernels are never stored.

Forward and map gradient predict the kernels, one matrix product per tap; the gradients of
``hidden`` and ``weight`` multiply the kernel gradient, which is not stored either.

Arguments of the kernels: ``x`` and ``grad`` are maps ``(B, H, W, S, G)``, channel ``c`` being
``(c % S, c // S)``; ``hidden`` is ``(B, H, W, D)``, ``weight`` ``(K*K, G, D)``, ``bias``
``(K*K, G)``. ``before`` is the zero padding before each axis; ``bucket`` only keys the autotuner.
A tile has BLOCK_P positions, BLOCK_S of the S channels, BLOCK_G groups and BLOCK_D of D; BLOCKS
blocks cover D in ``_mix`` and G in ``_hidden_gradient``, TAPS covers the taps of a kernel row, and
DOT is the dtype of ``tl.dot`` operands.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from backbones.ops.triton_kernels import (
    CHANGING,
    added,
    launches,
    located,
    operands,
    parts,
    power,
    span,
    visible,
)
from backbones.ops.triton_kernels.tuning import bucket, run, tile


@triton.jit
def _inputs(
    hidden, places, here, start, D,
    BLOCK_D: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """A block of ``hidden`` at some positions, ``(BLOCK_P, BLOCK_D)``, zero where not ``here``."""
    depth = start + tl.arange(0, BLOCK_D)
    mask = here[:, None] & (depth < D)[None]
    return tl.load(hidden + places[:, None] * D + depth[None], mask, 0.0).to(DOT)


@triton.jit(do_not_specialize=CHANGING)
def _mix(
    x, hidden, weight, bias, out, H, W, S, G, D, bucket, K: tl.constexpr, before: tl.constexpr,
    gather: tl.constexpr, BLOCKS: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_S: tl.constexpr,
    BLOCK_G: tl.constexpr, BLOCK_D: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """``out[p] = sum of x[p + tap] * kernel[p, tap]``, with ``gather`` the map gradient,
    ``sum of x[p - tap] * kernel[p - tap, tap]``.
    """
    blocks = tl.cdiv(G, BLOCK_G)
    row, left, block = located(W, tl.cdiv(S, BLOCK_S) * blocks, BLOCK_P)
    columns = left + tl.arange(0, BLOCK_P)
    shared = block // blocks * BLOCK_S + tl.arange(0, BLOCK_S)
    groups = block % blocks * BLOCK_G + tl.arange(0, BLOCK_G)
    image, y = (row // H).to(tl.int64), row % H
    own = (image * H + y) * W + columns
    channels = shared[:, None] * G + groups[None]
    real = (shared < S)[:, None] & (groups < G)[None]
    # Of the same positions for all taps, unless the kernels of others are gathered.
    once: tl.constexpr = BLOCKS == 1 and not gather
    if once:
        inputs = _inputs(hidden, own, columns < W, 0, D, BLOCK_D, DOT)
    total = tl.full((BLOCK_P, BLOCK_S, BLOCK_G), 0.0, tl.float32)
    for u in range(K):
        for v in range(K):
            move_y = before - u if gather else u - before
            move_x = before - v if gather else v - before
            from_y, from_x = y + move_y, columns + move_x
            inside = (
                (columns < W) & (from_x >= 0) & (from_x < W) & (from_y >= 0) & (from_y < H)
            ) != 0
            places = (image * H + from_y) * W + from_x
            rows = (u * K + v) * G + groups
            kernel = tl.full((BLOCK_P, BLOCK_G), 0.0, tl.float32)
            for number in range(BLOCKS):
                depth = number * BLOCK_D + tl.arange(0, BLOCK_D)
                w = tl.load(
                    weight + rows[None] * D + depth[:, None],
                    (groups < G)[None] & (depth < D)[:, None],
                    0.0,
                ).to(DOT)
                if once:
                    kernel += tl.dot(inputs, w, input_precision="ieee")
                else:
                    at = places if gather else own
                    h = _inputs(hidden, at, inside, number * BLOCK_D, D, BLOCK_D, DOT)
                    kernel += tl.dot(h, w, input_precision="ieee")
            kernel += tl.load(bias + rows, groups < G, 0.0).to(tl.float32)[None]
            kernel = tl.where(inside[:, None], kernel, 0.0)
            values = tl.load(
                x + places[:, None, None] * S * G + channels[None],
                inside[:, None, None] & real[None],
                0.0,
            )
            total += values.to(tl.float32) * kernel[:, None, :]
    tl.store(
        out + own[:, None, None] * S * G + channels[None],
        total.to(out.dtype.element_ty),
        (columns < W)[:, None, None] & real[None],
    )


@triton.jit
def row_gradient(
    x, grad, own, y, columns, here, groups, u, H, W, S, G, K: tl.constexpr, before: tl.constexpr,
    TAPS: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_G: tl.constexpr,
):  # fmt: skip
    """The gradient of the kernels' row ``u``, ``sum over S of x[p + tap] * grad[p]``.

    ``(BLOCK_P, TAPS, BLOCK_G)`` in float32; ``own`` are indices into B*H*W, TAPS covers K.
    """
    v = tl.arange(0, TAPS)
    from_y, from_x = y + u - before, columns[:, None] + v[None] - before
    seen = (here & (from_y >= 0) & (from_y < H)) != 0
    inside = seen[:, None] & (v < K)[None] & (from_x >= 0) & (from_x < W)
    places = own[:, None] + (u - before) * W + v[None] - before
    real = groups < G
    total = tl.full((BLOCK_P, TAPS, BLOCK_G), 0.0, tl.float32)
    for s in range(S):
        channels = s * G + groups
        given = tl.load(
            grad + own[:, None] * S * G + channels[None], seen[:, None] & real[None], 0.0
        )
        values = tl.load(
            x + places[:, :, None] * S * G + channels[None, None],
            inside[:, :, None] & real[None, None],
            0.0,
        )
        total += values.to(tl.float32) * given.to(tl.float32)[:, None, :]
    return total


@triton.jit(do_not_specialize=CHANGING)
def _hidden_gradient(
    x, grad, weight, out, H, W, S, G, D, bucket, BLOCKS: tl.constexpr, K: tl.constexpr,
    before: tl.constexpr, TAPS: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_G: tl.constexpr,
    BLOCK_D: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """``sum over taps of kernel_gradient @ weight[tap]`` for a tile of positions and D.

    One product has the taps of one kernel row.
    """
    row, left, block_d = located(W, tl.cdiv(D, BLOCK_D), BLOCK_P)
    columns = left + tl.arange(0, BLOCK_P)
    depth = block_d * BLOCK_D + tl.arange(0, BLOCK_D)
    image, y = (row // H).to(tl.int64), row % H
    own, here = (image * H + y) * W + columns, columns < W
    pairs = tl.arange(0, TAPS * BLOCK_G)
    v = pairs // BLOCK_G
    total = tl.full((BLOCK_P, BLOCK_D), 0.0, tl.float32)
    for block in range(BLOCKS):
        groups = block * BLOCK_G + tl.arange(0, BLOCK_G)
        group = block * BLOCK_G + pairs % BLOCK_G
        for u in range(K):
            received = row_gradient(
                x, grad, own, y, columns, here, groups, u, H, W, S, G, K, before,
                TAPS, BLOCK_P, BLOCK_G,
            )  # fmt: skip
            received = tl.reshape(received, (BLOCK_P, TAPS * BLOCK_G))
            w = tl.load(
                weight + ((u * K + v) * G + group)[:, None] * D + depth[None],
                ((v < K) & (group < G))[:, None] & (depth < D)[None],
                0.0,
            )
            total += tl.dot(received.to(DOT), w.to(DOT), input_precision="ieee")
    mask = here[:, None] & (depth < D)[None]
    tl.store(out + own[:, None] * D + depth[None], total.to(out.dtype.element_ty), mask)


@triton.jit(do_not_specialize=CHANGING)
def _weight_gradient(
    x, grad, hidden, out, out_bias, H, W, S, G, D, rows, chunks,
    K: tl.constexpr, before: tl.constexpr, TAPS: tl.constexpr, BLOCK_P: tl.constexpr,
    BLOCK_G: tl.constexpr, BLOCK_D: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """``kernel_gradient^T @ hidden`` and ``sum of kernel_gradient`` for the taps of a kernel row.

    A program sums one of ``chunks`` chunks of ``rows``, for a tile of groups and D.
    """
    blocks = tl.cdiv(G, BLOCK_G)
    tiles = tl.cdiv(D, BLOCK_D) * blocks
    # Programs of the same positions follow each other, so that the cache has them.
    chunk, u = tl.program_id(0) // tiles // K, tl.program_id(0) // tiles % K
    tile = tl.program_id(0) % tiles
    depth = tile // blocks * BLOCK_D + tl.arange(0, BLOCK_D)
    groups = tile % blocks * BLOCK_G + tl.arange(0, BLOCK_G)
    total = tl.full((TAPS * BLOCK_G, BLOCK_D), 0.0, tl.float32)
    received = tl.full((BLOCK_P, TAPS, BLOCK_G), 0.0, tl.float32)
    total_bias = received
    first, last = span(chunk, chunks, rows)
    # Tiles go on from row to row: those of a narrow map are full, too.
    for start in range(0, (last - first) * W, BLOCK_P):
        place = start + tl.arange(0, BLOCK_P)
        row, columns = first + place // W, place % W
        y, here = row % H, row < last
        own = row.to(tl.int64) * W + columns
        received = row_gradient(
            x, grad, own, y, columns, here, groups, u, H, W, S, G, K, before,
            TAPS, BLOCK_P, BLOCK_G,
        )  # fmt: skip
        h = _inputs(hidden, own, here, tile // blocks * BLOCK_D, D, BLOCK_D, DOT)
        flat = tl.reshape(received, (BLOCK_P, TAPS * BLOCK_G))
        total += tl.dot(tl.trans(flat).to(DOT), h, input_precision="ieee")
        total_bias += received
    pairs = tl.arange(0, TAPS * BLOCK_G)
    v, group = pairs // BLOCK_G, tile % blocks * BLOCK_G + pairs % BLOCK_G
    row = (chunk.to(tl.int64) * K + u) * K
    real = (v < K) & (group < G)
    place = (row + v) * G + group
    tl.store(out + place[:, None] * D + depth[None], total, real[:, None] & (depth < D)[None])
    # Programs of all blocks of D write the same values.
    tl.store(out_bias + place, tl.reshape(tl.sum(total_bias, 0), (TAPS * BLOCK_G,)), real)


@launches
def forward(x: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor, size: int) -> Tensor:
    """Predict the kernels from ``hidden`` and convolve ``x`` with them."""
    return _run_mix(x, hidden, weight, bias, size, gather=False)


@launches
def backward(
    grad: Tensor, x: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor, size: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of x, hidden, weight and bias; the last two in float32."""
    grad_x = _run_mix(grad, hidden, weight, bias, size, gather=True)
    grad_hidden = torch.empty_like(hidden)
    batch, height, width, shared, groups = x.shape
    depth, before = hidden.shape[-1], (size - 1) // 2
    rows = batch * height
    read = (2 * x.numel() + hidden.numel()) * x.element_size()
    chunks = parts(rows, weight.numel(), read)
    grad_weight = weight.new_zeros(chunks, *weight.shape, dtype=torch.float32)
    grad_bias = bias.new_zeros(chunks, *bias.shape, dtype=torch.float32)
    if x.numel():
        fixed = _fixed(x, depth, most=64)
        taps = power(size, 1)
        sizes = (height, width, shared, groups, depth)
        blocks = triton.cdiv(depth, fixed["BLOCK_D"])
        blocks_g = triton.cdiv(groups, fixed["BLOCK_G"])
        run(
            _hidden_gradient,
            lambda tile: (rows * triton.cdiv(width, tile["BLOCK_P"]) * blocks,), pieces(),
            x, grad, weight, grad_hidden, *sizes, bucket(x), blocks_g, size, before,
            TAPS=taps, **fixed,
        )  # fmt: skip
        visible(_weight_gradient)[(chunks * size * blocks * blocks_g,)](
            x, grad, hidden, grad_weight, grad_bias, *sizes, rows, chunks, size, before,
            TAPS=taps, BLOCK_P=32, num_warps=8, **fixed,
        )  # fmt: skip
    return grad_x, grad_hidden, added(grad_weight, 0), added(grad_bias, 0)


def _run_mix(
    x: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor, size: int, gather: bool
) -> Tensor:
    out = torch.empty_like(x)
    if not out.numel():
        return out
    batch, height, width, shared, groups = x.shape
    depth = hidden.shape[-1]
    # One block, whose product with all taps needs ``hidden`` once; gathered, it is read for each.
    fixed = _fixed(x, depth, most=64 if gather else 128)

    def grid(tile: dict) -> tuple[int]:
        blocks = triton.cdiv(shared, tile["BLOCK_S"]) * triton.cdiv(groups, fixed["BLOCK_G"])
        return (batch * height * triton.cdiv(width, tile["BLOCK_P"]) * blocks,)

    run(
        _mix, grid, boxes(shared, fixed["BLOCK_G"]),
        x, hidden, weight, bias, out, height, width, shared, groups, depth, bucket(x),
        size, (size - 1) // 2, gather, triton.cdiv(depth, fixed["BLOCK_D"]), **fixed,
    )  # fmt: skip
    return out


def boxes(shared: int, block_g: int) -> tuple[triton.Config, ...]:
    """Tiles of positions and S channels to time; their sums fit into registers."""
    least, most = min(4, power(shared, 1)), min(32, power(shared, 1))
    sides = [(16, least), (32, least), (64, least), (16, 8), (32, 8), (64, 8), (16, 32)]
    sides = [(p, s) for p, s in sides if s <= most and p * s * block_g <= 64 * 256]
    return tuple(
        tile(8 if p * s * block_g > 64 * 128 else 4, BLOCK_P=p, BLOCK_S=s) for p, s in sides
    )


def pieces() -> tuple[triton.Config, ...]:
    """Tiles of positions to time; with the taps of a row they exceed the registers of 4 warps."""
    return tile(8, BLOCK_P=16), tile(8, BLOCK_P=32)


def _fixed(x: Tensor, depth: int, most: int) -> dict[str, object]:
    """The constants that are not tuned; a block of D has at most ``most``."""
    block_g, block_d = min(32, power(x.shape[4])), power(depth)
    # Where several blocks cover D, smaller ones cover less that is not there.
    block_d = block_d if block_d <= most else min(64, most)
    return {"BLOCK_G": block_g, "BLOCK_D": block_d, "DOT": operands(x.dtype)}
