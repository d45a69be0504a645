"""Triton kernels of the operators, for GPUs; imported when the first of them runs.

All maps are contiguous and channels-last. Sums are kept in float32, offsets in 64 bits; what sums
over positions does so in parts whose number depends on shapes alone, and the parts are added up in
order: no atomics, so that gradients repeat bit for bit. With ``TRITON_INTERPRET=1`` they run on a
CPU, slowly, which is how they are tested where there is no GPU.
Masks of a scalar and a vector end in `!= 0`: Triton 3.9's interpreter makes int32 of them.
"""

from collections.abc import Callable
from functools import wraps

import torch
import triton
import triton.language as tl

# Sums over positions: parts of them, enough for every multiprocessor of a large GPU.
PARTS = 256
# Arguments that a detector changes with every image: no kernel is compiled for each of their kinds.
CHANGING = ["H", "W", "rows", "chunks", "shared", "windows", "members", "M", "bucket"]


def launches(function: Callable) -> Callable:
    """Run kernels where the first tensor is, whatever device is the process's current one."""

    @wraps(function)
    def launch(first: torch.Tensor, *others):
        with torch.cuda.device_of(first):
            return function(first, *others)

    return launch


def power(n: int, least: int = 16) -> int:
    """The next power of two, at least as large as a tile's side must be."""
    return max(least, triton.next_power_of_2(n))


def parts(blocks: int, numel: int) -> int:
    """Parts of a sum over so many blocks whose results have so many numbers: 64 MB at most."""
    return max(1, min(blocks, PARTS, 2**24 // max(1, numel)))


def operands(dtype: torch.dtype) -> tl.dtype:
    """What products multiply; the interpreter cannot multiply bfloat16."""
    if triton.knobs.runtime.interpret:
        return tl.float32
    return {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}.get(dtype, tl.float32)
