"""Depth-wise convolution with a given kernel at every position: forward and both gradients.

Arguments of the kernels: ``x`` and ``grad`` are maps ``(B, H, W, S, G)``, ``kernels``
``(B, H, W, G, K*K)``; ``before`` is the zero padding before each axis; ``bucket`` only keys the
autotuner. A tile has BLOCK_P positions of a row, BLOCK_S of the S channels and BLOCK_G groups.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from backbones.ops.triton_kernels import CHANGING, launches, power
from backbones.ops.triton_kernels.inhomogeneous import boxes, pieces
from backbones.ops.triton_kernels.tuning import bucket, run


@triton.jit(do_not_specialize=CHANGING)
def _mix(
    x, kernels, out, H, W, S, G, bucket, K: tl.constexpr, before: tl.constexpr,
    gather: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_G: tl.constexpr,
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
            at = ((places if gather else own)[:, None] * G + groups[None]) * (K * K) + u * K + v
            kernel = tl.load(kernels + at, inside[:, None] & (groups < G)[None], 0.0)
            at = places[:, None, None] * S * G + channels[None]
            values = tl.load(x + at, inside[:, None, None] & real[None], 0.0)
            total += values.to(tl.float32) * kernel.to(tl.float32)[:, None, :]
    tl.store(
        out + own[:, None, None] * S * G + channels[None],
        total.to(out.dtype.element_ty),
        (columns < W)[:, None, None] & real[None],
    )


@triton.jit(do_not_specialize=CHANGING)
def _kernel_gradient(
    x, grad, out, H, W, S, G, bucket, K: tl.constexpr, before: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_G: tl.constexpr,
):  # fmt: skip
    """``sum over S of x[p + tap] * grad[p]`` for all taps of a tile."""
    row = tl.program_id(0)
    columns = tl.program_id(1) * BLOCK_P + tl.arange(0, BLOCK_P)
    groups = tl.program_id(2) * BLOCK_G + tl.arange(0, BLOCK_G)
    image, y = (row // H).to(tl.int64), row % H
    own = (image * H + y) * W + columns
    here = (columns < W)[:, None] & (groups < G)[None]
    for u in range(K):
        for v in range(K):
            from_y, from_x = y + u - before, columns + v - before
            inside = ((from_x >= 0) & (from_x < W) & (from_y >= 0) & (from_y < H)) != 0
            places = ((image * H + from_y) * W + from_x)[:, None] * S * G + groups[None]
            total = tl.full((BLOCK_P, BLOCK_G), 0.0, tl.float32)
            for s in range(S):
                given = tl.load(grad + own[:, None] * S * G + s * G + groups[None], here, 0.0)
                values = tl.load(x + places + s * G, here & inside[:, None], 0.0)
                total += values.to(tl.float32) * given.to(tl.float32)
            at = (own[:, None] * G + groups[None]) * (K * K) + u * K + v
            tl.store(out + at, total.to(out.dtype.element_ty), here)


@launches
def aggregate(x: Tensor, kernels: Tensor, size: int) -> Tensor:
    """Convolve ``(B, H, W, S, G)`` with kernels ``(B, H, W, G, K*K)``."""
    return _run_mix(x, kernels, size, gather=False)


@launches
def aggregate_backward(
    grad: Tensor, x: Tensor, kernels: Tensor, size: int
) -> tuple[Tensor, Tensor]:
    """The gradients of ``x`` and ``kernels``, in their dtypes."""
    grad_kernels = torch.empty_like(kernels)
    batch, height, width, shared, groups = x.shape
    if x.numel():
        block_g = min(32, power(groups))
        blocks = triton.cdiv(groups, block_g)
        run(
            _kernel_gradient,
            lambda tile: (batch * height, triton.cdiv(width, tile["BLOCK_P"]), blocks), pieces(),
            x, grad, grad_kernels, height, width, shared, groups, bucket(x), size, (size - 1) // 2,
            BLOCK_G=block_g,
        )  # fmt: skip
    return _run_mix(grad, kernels, size, gather=True), grad_kernels


def _run_mix(x: Tensor, kernels: Tensor, size: int, gather: bool) -> Tensor:
    out = torch.empty_like(x)
    if not out.numel():
        return out
    batch, height, width, shared, groups = x.shape
    block_g = min(32, power(groups))

    def grid(tile: dict) -> tuple[int, int, int]:
        blocks = triton.cdiv(shared, tile["BLOCK_S"]) * triton.cdiv(groups, block_g)
        return batch * height, triton.cdiv(width, tile["BLOCK_P"]), blocks

    run(
        _mix, grid, boxes(shared, block_g),
        x, kernels, out, height, width, shared, groups, bucket(x), size, (size - 1) // 2, gather,
        BLOCK_G=block_g,
    )  # fmt: skip
    return out
