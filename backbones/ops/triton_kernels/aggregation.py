"""Depth-wise convolution with a given kernel at every position: forward and both gradients.

Arguments of the kernels: ``x`` and ``grad`` are maps ``(B, H, W, S, G)``, ``kernels``
``(B, H, W, G, K*K)`` with groups adjacent in memory, ``place_step`` elements from one position to
the next and ``tap_step`` from one tap to the next; ``before`` is the zero padding before each axis;
``bucket`` only keys the autotuner. A tile has BLOCK_P positions of a row, BLOCK_S of the S channels
and BLOCK_G groups.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from backbones.ops.triton_kernels import CHANGING, launches, located, power
from backbones.ops.triton_kernels.inhomogeneous import boxes, row_gradient
from backbones.ops.triton_kernels.tuning import bucket, run, tile

# Tiles of positions to time for the gradient of kernels.
_PIECES = tile(4, BLOCK_P=16), tile(8, BLOCK_P=32)


@triton.jit(do_not_specialize=CHANGING)
def _mix(
    x, kernels, out, H, W, S, G, place_step, tap_step, bucket, K: tl.constexpr,
    before: tl.constexpr, gather: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_S: tl.constexpr,
    BLOCK_G: tl.constexpr,
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
            at = (places if gather else own)[:, None] * place_step + (u * K + v) * tap_step
            kernel = tl.load(kernels + at + groups[None], inside[:, None] & (groups < G)[None], 0.0)
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
    x, grad, out, H, W, S, G, place_step, tap_step, bucket, K: tl.constexpr,
    before: tl.constexpr, TAPS: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_G: tl.constexpr,
):  # fmt: skip
    """``sum over S of x[p + tap] * grad[p]`` for all taps of a tile; ``out`` is as ``kernels``."""
    row, left, block = located(W, tl.cdiv(G, BLOCK_G), BLOCK_P)
    columns = left + tl.arange(0, BLOCK_P)
    groups = block * BLOCK_G + tl.arange(0, BLOCK_G)
    image, y = (row // H).to(tl.int64), row % H
    own, v = (image * H + y) * W + columns, tl.arange(0, TAPS)
    here = (columns < W)[:, None] & (v < K)[None]
    for u in range(K):
        total = row_gradient(
            x, grad, own, y, columns, columns < W, groups, u, H, W, S, G, K, before,
            TAPS, BLOCK_P, BLOCK_G,
        )  # fmt: skip
        at = own[:, None] * place_step + (u * K + v)[None] * tap_step
        tl.store(
            out + at[:, :, None] + groups[None, None],
            total.to(out.dtype.element_ty),
            here[:, :, None] & (groups < G)[None, None],
        )


@launches
def aggregate(x: Tensor, kernels: Tensor, size: int) -> Tensor:
    """Convolve ``(B, H, W, S, G)`` with kernels ``(B, H, W, G, K*K)``.

    Kernels with adjacent groups in memory, as ``(B, H, W, K*K, G)`` has them, are not copied.
    """
    return _run_mix(x, kernels, size, gather=False)


@launches
def aggregate_backward(
    grad: Tensor, x: Tensor, kernels: Tensor, size: int
) -> tuple[Tensor, Tensor]:
    """The gradients of ``x`` and ``kernels``, in their dtypes; the latter's groups are adjacent."""
    taps = kernels.shape[-1]
    grad_kernels = kernels.new_empty(*x.shape[:3], taps, x.shape[4]).mT
    batch, height, width, shared, groups = x.shape
    if x.numel():
        block_g = min(32, power(groups))
        blocks = triton.cdiv(groups, block_g)
        run(
            _kernel_gradient,
            lambda tile: (batch * height * triton.cdiv(width, tile["BLOCK_P"]) * blocks,),
            _PIECES,
            x, grad, grad_kernels, height, width, shared, groups, taps * groups, groups, bucket(x),
            size, (size - 1) // 2, TAPS=power(size, 1), BLOCK_G=block_g,
        )  # fmt: skip
    return _run_mix(grad, kernels, size, gather=True), grad_kernels


def by_tap(kernels: Tensor) -> tuple[Tensor, int, int]:
    """``(B, H, W, G, K*K)`` with adjacent groups, ``place_step`` and ``tap_step``.

    The kernels are copied only if groups are not adjacent or positions not at equal distances.
    """
    _, height, width, groups, taps = kernels.shape
    image, row, place, group, tap = kernels.stride()
    even = row == width * place and image == height * row
    if group == 1 and even and taps * tap < 2**31:
        return kernels, place, tap
    return kernels.mT.contiguous().mT, taps * groups, groups


def _run_mix(x: Tensor, kernels: Tensor, size: int, gather: bool) -> Tensor:
    out = torch.empty_like(x)
    if not out.numel():
        return out
    batch, height, width, shared, groups = x.shape
    block_g = min(32, power(groups))
    kernels, *steps = by_tap(kernels)

    def grid(tile: dict) -> tuple[int]:
        blocks = triton.cdiv(shared, tile["BLOCK_S"]) * triton.cdiv(groups, block_g)
        return (batch * height * triton.cdiv(width, tile["BLOCK_P"]) * blocks,)

    run(
        _mix, grid, boxes(shared, block_g),
        x, kernels, out, height, width, shared, groups, *steps, bucket(x),
        size, (size - 1) // 2, gather, BLOCK_G=block_g,
    )  # fmt: skip
    return out
