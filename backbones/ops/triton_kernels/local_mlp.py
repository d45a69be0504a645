"""Learned static mixing inside shifted windows; roll and partition are index arithmetic.

Arguments of the kernels: ``value``, ``grad`` and ``out`` are maps ``(B, H, W, heads * D)``;
``mixing`` is ``(M, heads, N, N)``, M being 1 or the windows of an image. Set ``m`` is for
``members`` windows, numbers ``i * M + m`` counted through all images, in ``chunks`` chunks.
``rows`` and ``columns`` are the window size, ``down`` and ``right`` the shift, N the positions of a
window.
BLOCK_N covers N, BLOCKS blocks of BLOCK_D cover D, and DOT is the dtype of ``tl.dot`` operands.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from backbones.ops.triton_kernels import CHANGING, added, launches, operands, parts, power, visible
from backbones.ops.triton_kernels.window import _places

# Windows per program of the forward pass, which loads their weights once.
_WINDOWS = 4
# num_warps: a few 64x64 tiles exceed the registers of 4 warps.
WARPS = 8


@triton.jit(do_not_specialize=CHANGING)
def _mix(
    value, mixing, out, M, members, chunks, H, W, heads, D, rows, columns, down, right, N,
    back: tl.constexpr, BLOCKS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    DOT: tl.constexpr,
):  # fmt: skip
    """Mix one head of a chunk of windows; ``back`` transposes the weights, for the gradient."""
    group, head = tl.program_id(0), tl.program_id(1)
    m, chunk = (group % M).to(tl.int64), (group // M).to(tl.int64)
    n = tl.arange(0, BLOCK_N)
    C = heads * D
    place = ((m * heads + head) * N + n)[:, None] * N + n[None]
    weights = tl.load(mixing + place, (n < N)[:, None] & (n < N)[None], 0.0).to(DOT)
    if back:
        weights = tl.trans(weights)
    for member in range(members * chunk // chunks, members * (chunk + 1) // chunks):
        places, side = _places(member * M + m, H, W, rows, columns, down, right, N, BLOCK_N)
        kept = tl.where(side[:, None] == side[None], weights, 0.0).to(DOT)
        for block in range(BLOCKS):
            d = block * BLOCK_D + tl.arange(0, BLOCK_D)
            real = (n < N)[:, None] & (d < D)[None]
            at = places[:, None] * C + (head * D + d)[None]
            values = tl.load(value + at, real, 0.0)
            mixed = tl.dot(kept, values.to(DOT), input_precision="ieee")
            tl.store(out + at, mixed.to(out.dtype.element_ty), real)


@triton.jit(do_not_specialize=CHANGING)
def _weight_gradient(
    value, grad, out, M, members, chunks, H, W, heads, D, rows, columns, down, right, N,
    BLOCKS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """Sum ``grad @ value^T``, masked across the seam, over one head of a chunk of windows."""
    group, head = tl.program_id(0), tl.program_id(1)
    m, chunk = (group % M).to(tl.int64), (group // M).to(tl.int64)
    n = tl.arange(0, BLOCK_N)
    C = heads * D
    total = tl.full((BLOCK_N, BLOCK_N), 0.0, tl.float32)
    for member in range(members * chunk // chunks, members * (chunk + 1) // chunks):
        places, side = _places(member * M + m, H, W, rows, columns, down, right, N, BLOCK_N)
        for block in range(BLOCKS):
            d = block * BLOCK_D + tl.arange(0, BLOCK_D)
            real = (n < N)[:, None] & (d < D)[None]
            at = places[:, None] * C + (head * D + d)[None]
            given = tl.load(grad + at, real, 0.0).to(DOT)
            values = tl.trans(tl.load(value + at, real, 0.0).to(DOT))
            product = tl.dot(given, values, input_precision="ieee")
            total += tl.where(side[:, None] == side[None], product, 0.0)
    place = (((chunk * M + m) * heads + head) * N + n)[:, None] * N + n[None]
    tl.store(out + place, total, (n < N)[:, None] & (n < N)[None])


@launches
def forward(value: Tensor, mixing: Tensor, window_size: list[int], shift: list[int]) -> Tensor:
    """Mix ``(B, H, W, C)`` by ``(heads, N, N)`` or ``(nH, nW, heads, N, N)``."""
    return _run_mix(value, mixing, window_size, shift, back=False)


@launches
def backward(
    grad: Tensor, value: Tensor, mixing: Tensor, window_size: list[int], shift: list[int]
) -> tuple[Tensor, Tensor]:
    """The gradients of ``value`` and, in float32, of ``mixing``."""
    sets, members, sizes, blocks = _options(value, mixing, window_size, shift)
    chunks = max(1, parts(members, mixing.numel()) // sets)
    grad_mixing = mixing.new_zeros(chunks, *mixing.shape, dtype=torch.float32)
    if members:
        visible(_weight_gradient)[(sets * chunks, mixing.shape[-3])](
            value, grad, grad_mixing, sets, members, chunks, *sizes, *blocks, num_warps=WARPS
        )
    return _run_mix(grad, mixing, window_size, shift, back=True), added(grad_mixing, 0)


def _run_mix(
    value: Tensor, mixing: Tensor, window_size: list[int], shift: list[int], back: bool
) -> Tensor:
    out = torch.empty_like(value)
    sets, members, sizes, blocks = _options(value, mixing, window_size, shift)
    if members:
        chunks = triton.cdiv(members, _WINDOWS)
        visible(_mix)[(sets * chunks, mixing.shape[-3])](
            value, mixing, out, sets, members, chunks, *sizes, back, *blocks, num_warps=WARPS
        )
    return out


def _options(value: Tensor, mixing: Tensor, window_size: list[int], shift: list[int]):
    """M, ``members``, and the sizes and blocks that both kernels take."""
    batch, height, width, channels = value.shape
    heads, positions = mixing.shape[-3:-1]
    windows = batch * (height // window_size[0]) * (width // window_size[1])
    sets = mixing.shape[0] * mixing.shape[1] if mixing.dim() == 5 else 1
    depth = channels // heads
    block_d = min(64, power(depth))
    sizes = (height, width, heads, depth, *window_size, *shift, positions)
    blocks = (triton.cdiv(depth, block_d), power(positions), block_d, operands(value.dtype))
    return sets, windows // sets, sizes, blocks
