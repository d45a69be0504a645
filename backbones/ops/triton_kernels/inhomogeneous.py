"""Depth-wise convolution with kernels predicted at every position; the kernels are never stored.

Forward and map gradient predict the kernels, one matrix product per tap; the gradients of
``hidden`` and ``weight`` multiply the kernel gradient, which is not stored either.

Arguments of the kernels: ``x`` and ``grad`` are maps ``(B, H, W, S, G)``, channel ``c`` being
``(c % S, c // S)``; ``hidden`` is ``(B, H, W, D)``, ``weight`` ``(K*K, G, D)``, ``bias``
``(K*K, G)``. ``before`` is the zero padding before each axis; ``bucket`` only keys the autotuner.
A tile has BLOCK_P positions of a row, BLOCK_S of the S channels, BLOCK_G groups and BLOCK_D of D;
BLOCKS blocks of BLOCK_G cover G; DOT is the dtype of ``tl.dot`` operands.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from backbones.ops.triton_kernels import CHANGING, launches, operands, parts, power
from backbones.ops.triton_kernels.tuning import bucket, run, tile


@triton.jit
def _predict(
    hidden, weight, bias, places, here, groups, tap, G, D,
    BLOCK_P: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_D: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """The kernels of one tap, ``(BLOCK_P, BLOCK_G)`` in float32, zero where ``here`` is False."""
    total = tl.full((BLOCK_P, BLOCK_G), 0.0, tl.float32)
    for start in range(0, D, BLOCK_D):
        depth = start + tl.arange(0, BLOCK_D)
        h = tl.load(
            hidden + places[:, None] * D + depth[None], here[:, None] & (depth < D)[None], 0.0
        )
        w = tl.load(
            weight + (tap * G + groups)[None] * D + depth[:, None],
            (groups < G)[None] & (depth < D)[:, None],
            0.0,
        )
        total += tl.dot(h.to(DOT), w.to(DOT), input_precision="ieee")
    total += tl.load(bias + tap * G + groups, groups < G, 0.0).to(tl.float32)[None]
    return tl.where(here[:, None], total, 0.0)


@triton.jit(do_not_specialize=CHANGING)
def _mix(
    x, hidden, weight, bias, out, H, W, S, G, D, bucket, K: tl.constexpr, before: tl.constexpr,
    gather: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_G: tl.constexpr,
    BLOCK_D: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """``out[p] = sum of x[p + tap] * kernel[p, tap]``, with ``gather`` the map gradient,
    ``sum of x[p - tap] * kernel[p - tap, tap]``.
    """
    row = tl.program_id(0)
    columns = tl.program_id(1) * BLOCK_P + tl.arange(0, BLOCK_P)
    blocks = tl.cdiv(G, BLOCK_G)
    shared = tl.program_id(2) // blocks * BLOCK_S + tl.arange(0, BLOCK_S)
    groups = tl.program_id(2) % blocks * BLOCK_G + tl.arange(0, BLOCK_G)
    image, y = (row // H).to(tl.int64), row % H
    own = (image * H + y) * W + columns
    channels = shared[:, None] * G + groups[None]
    real = (shared < S)[:, None] & (groups < G)[None]
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
            kernel = _predict(
                hidden, weight, bias, places if gather else own, inside, groups, u * K + v, G, D,
                BLOCK_P, BLOCK_G, BLOCK_D, DOT,
            )  # fmt: skip
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
def _kernel_gradient(
    x, grad, image, y, columns, here, groups, u, v, H, W, S, G, before,
    BLOCK_P: tl.constexpr, BLOCK_G: tl.constexpr,
):  # fmt: skip
    """The gradient of one tap's kernels, ``sum over S of x[p + tap] * grad[p]``."""
    from_y, from_x = y + u - before, columns + v - before
    inside = (here & (from_x >= 0) & (from_x < W) & (from_y >= 0) & (from_y < H)) != 0
    own = ((image * H + y) * W + columns)[:, None] * S * G + groups[None]
    places = ((image * H + from_y) * W + from_x)[:, None] * S * G + groups[None]
    mask = inside[:, None] & (groups < G)[None]
    total = tl.full((BLOCK_P, BLOCK_G), 0.0, tl.float32)
    for s in range(S):
        values = tl.load(x + places + s * G, mask, 0.0).to(tl.float32)
        total += values * tl.load(grad + own + s * G, mask, 0.0).to(tl.float32)
    return total


@triton.jit(do_not_specialize=CHANGING)
def _hidden_gradient(
    x, grad, weight, out, H, W, S, G, D, bucket, BLOCKS: tl.constexpr, K: tl.constexpr,
    before: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_D: tl.constexpr,
    DOT: tl.constexpr,
):  # fmt: skip
    """``sum over taps of kernel_gradient @ weight[tap]`` for a tile of positions and D."""
    row = tl.program_id(0)
    columns = tl.program_id(1) * BLOCK_P + tl.arange(0, BLOCK_P)
    depth = tl.program_id(2) * BLOCK_D + tl.arange(0, BLOCK_D)
    image, y = (row // H).to(tl.int64), row % H
    here = columns < W
    total = tl.full((BLOCK_P, BLOCK_D), 0.0, tl.float32)
    for block in range(BLOCKS):
        groups = block * BLOCK_G + tl.arange(0, BLOCK_G)
        for u in range(K):
            for v in range(K):
                received = _kernel_gradient(
                    x, grad, image, y, columns, here, groups, u, v, H, W, S, G, before,
                    BLOCK_P, BLOCK_G,
                )  # fmt: skip
                w = tl.load(
                    weight + ((u * K + v) * G + groups)[:, None] * D + depth[None],
                    (groups < G)[:, None] & (depth < D)[None],
                    0.0,
                )
                total += tl.dot(received.to(DOT), w.to(DOT), input_precision="ieee")
    places = ((image * H + y) * W + columns)[:, None] * D + depth[None]
    tl.store(out + places, total.to(out.dtype.element_ty), here[:, None] & (depth < D)[None])


@triton.jit(do_not_specialize=CHANGING)
def _weight_gradient(
    x, grad, hidden, out, out_bias, H, W, S, G, D, rows, chunks,
    K: tl.constexpr, before: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_G: tl.constexpr,
    BLOCK_D: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """``kernel_gradient^T @ hidden`` and ``sum of kernel_gradient`` for one tap.

    A program sums one of ``chunks`` chunks of ``rows``, for a tile of groups and D.
    """
    chunk, tap = tl.program_id(0), tl.program_id(1)
    blocks = tl.cdiv(G, BLOCK_G)
    depth = tl.program_id(2) // blocks * BLOCK_D + tl.arange(0, BLOCK_D)
    groups = tl.program_id(2) % blocks * BLOCK_G + tl.arange(0, BLOCK_G)
    total = tl.full((BLOCK_G, BLOCK_D), 0.0, tl.float32)
    total_bias = tl.full((BLOCK_G,), 0.0, tl.float32)
    for row in range(rows * chunk // chunks, rows * (chunk + 1) // chunks):
        image, y = (row // H).to(tl.int64), row % H
        for left in range(0, W, BLOCK_P):
            columns = left + tl.arange(0, BLOCK_P)
            here = columns < W
            received = _kernel_gradient(
                x, grad, image, y, columns, here, groups, tap // K, tap % K, H, W, S, G, before,
                BLOCK_P, BLOCK_G,
            )  # fmt: skip
            places = ((image * H + y) * W + columns)[:, None] * D + depth[None]
            h = tl.load(hidden + places, here[:, None] & (depth < D)[None], 0.0)
            total += tl.dot(tl.trans(received).to(DOT), h.to(DOT), input_precision="ieee")
            total_bias += tl.sum(received, 0)
    place = (chunk.to(tl.int64) * K * K + tap) * G + groups
    mask = (groups < G)[:, None] & (depth < D)[None]
    tl.store(out + place[:, None] * D + depth[None], total, mask)
    # Programs of all blocks of D write the same values.
    tl.store(out_bias + place, total_bias, groups < G)


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
    chunks = parts(rows, weight.numel())
    grad_weight = weight.new_zeros(chunks, *weight.shape, dtype=torch.float32)
    grad_bias = bias.new_zeros(chunks, *bias.shape, dtype=torch.float32)
    if x.numel():
        fixed = _fixed(x, depth)
        sizes = (height, width, shared, groups, depth)
        blocks = triton.cdiv(depth, fixed["BLOCK_D"])
        blocks_g = triton.cdiv(groups, fixed["BLOCK_G"])
        run(
            _hidden_gradient, lambda tile: (rows, triton.cdiv(width, tile["BLOCK_P"]), blocks),
            pieces(), x, grad, weight, grad_hidden, *sizes, bucket(x), blocks_g, size, before,
            **fixed,
        )  # fmt: skip
        _weight_gradient[(chunks, size**2, blocks * blocks_g)](
            x, grad, hidden, grad_weight, grad_bias, *sizes, rows, chunks, size, before,
            BLOCK_P=16, **fixed,
        )  # fmt: skip
    return grad_x, grad_hidden, grad_weight.sum(0), grad_bias.sum(0)


def _run_mix(
    x: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor, size: int, gather: bool
) -> Tensor:
    out = torch.empty_like(x)
    if not out.numel():
        return out
    batch, height, width, shared, groups = x.shape
    fixed = _fixed(x, hidden.shape[-1])

    def grid(tile: dict) -> tuple[int, int, int]:
        blocks = triton.cdiv(shared, tile["BLOCK_S"]) * triton.cdiv(groups, fixed["BLOCK_G"])
        return batch * height, triton.cdiv(width, tile["BLOCK_P"]), blocks

    run(
        _mix, grid, boxes(shared, fixed["BLOCK_G"]),
        x, hidden, weight, bias, out, height, width, shared, groups, hidden.shape[-1], bucket(x),
        size, (size - 1) // 2, gather, **fixed,
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
    """Tiles of positions to time."""
    return tuple(tile(BLOCK_P=p) for p in (16, 32, 64))


def _fixed(x: Tensor, depth: int) -> dict[str, object]:
    """The constants that are not tuned."""
    block_g, block_d = min(32, power(x.shape[4])), min(64, power(depth))
    return {"BLOCK_G": block_g, "BLOCK_D": block_d, "DOT": operands(x.dtype)}
