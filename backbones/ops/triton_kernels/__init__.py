"""The ``triton`` backend: kernels for GPUs, imported on first use.

All tensors are contiguous and maps channels-last. Kernels accumulate in float32 and use 64-bit
offsets. Sums over positions use no atomics but partial sums, whose number depends on shapes alone,
added in order: gradients are bitwise reproducible. With ``TRITON_INTERPRET=1`` the kernels run on a
CPU, slowly, for tests. Masks that combine a scalar and a vector end in ``!= 0`` because the
interpreter of Triton 3.9 turns them into int32.
"""

from collections.abc import Callable
from functools import wraps

import torch
import triton
import triton.language as tl

from backbones.ops.common import here

# Most partial sums over positions: enough for every multiprocessor of a large GPU.
PARTS = 256
# Arguments that change with the image size: Triton must not compile a kernel for each.
CHANGING = ["H", "W", "rows", "chunks", "shared", "windows", "members", "M", "bucket"]


def launches(function: Callable) -> Callable:
    """Decorate a launcher to run on the device of its first tensor."""

    @wraps(function)
    def launch(first: torch.Tensor, *others):
        if here.traced:
            return function(first, *others)
        with torch.cuda.device_of(first):
            return function(first, *others)

    return launch


def visible(kernel: Callable) -> Callable:
    """A kernel to launch, of which a compiler that traces the launch sees the source."""
    return torch.library.wrap_triton(kernel) if here.traced else kernel


def power(n: int, least: int = 16) -> int:
    """The next power of two, at least ``least``: ``tl.dot`` needs tiles of 16."""
    return max(least, triton.next_power_of_2(n))


def divisor(n: int, least: int, most: int) -> int:
    """The largest power of two that divides ``n``, or where it is below ``least``, covers it."""
    found = n & -n
    return min(most, found if found >= least else power(n))


def parts(blocks: int, numel: int, read: int | None = None) -> int:
    """Number of partial sums of ``numel`` float32 elements, capped by ``blocks``, PARTS and 64 MB.

    If a kernel reads maps of ``read`` bytes, the sums are written and read in an eighth of that.
    """
    most = min(blocks, PARTS, 2**24 // max(1, numel))
    if read is not None:
        most = min(most, read // max(1, 8 * 2 * 4 * numel))
    return max(1, most)


def added(partial: torch.Tensor, axis: int) -> torch.Tensor:
    """The sum of partial sums along ``axis``; a single one as it is."""
    return partial.select(axis, 0) if partial.shape[axis] == 1 else partial.sum(axis)


def operands(dtype: torch.dtype) -> tl.dtype:
    """The dtype of ``tl.dot`` operands; the interpreter gets float32, it lacks bfloat16."""
    if triton.knobs.runtime.interpret:
        return tl.float32
    return {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}.get(dtype, tl.float32)


@triton.jit
def located(W, blocks, BLOCK: tl.constexpr):
    """The row, first column and block of a program, one of ``blocks`` for a tile of BLOCK columns.

    Programs that read the same rows follow each other, so that the cache has them.
    """
    program, tiles = tl.program_id(0), tl.cdiv(W, BLOCK)
    return program // blocks // tiles, program // blocks % tiles * BLOCK, program % blocks


@triton.jit
def span(chunk, chunks, number):
    """Where one of ``chunks`` chunks of ``number`` things begins and where it ends, exclusive."""
    chunk = chunk.to(tl.int64)
    first, last = number * chunk // chunks, number * (chunk + 1) // chunks
    return first.to(tl.int32), last.to(tl.int32)
