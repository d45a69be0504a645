"""Autotuning: a kernel's tile is the fastest of a few, timed on the GPU at first use.

A timing holds for all maps with the same channels, groups and dtype and a size within a factor of
two; Triton caches it on disk. Kernels that sum over a whole map have a fixed tile, so that weight
gradients do not depend on timings.
"""

from collections.abc import Callable
from functools import cache

import torch
import triton

from backbones.ops.triton_kernels import visible

# Kernel arguments that key a timing, beside the dtypes.
_KEY = ["C", "S", "G", "D", "N", "heads", "K", "gather", "flip", "back", "bucket"]


def tile(warps: int = 4, **blocks: int) -> triton.Config:
    """A config with block sizes and num_warps."""
    return triton.Config(blocks, num_warps=warps)


def bucket(x: torch.Tensor) -> int:
    """The size class of a map ``(B, H, W, ...)``: the bit length of H*W."""
    return (x.shape[1] * x.shape[2]).bit_length()


def run(
    kernel: triton.runtime.JITFunction,
    grid: Callable[[dict], tuple[int, ...]],
    tiles: tuple[triton.Config, ...],
    *arguments: torch.Tensor | int | float,
    **constants: object,
) -> None:
    """Launch a kernel with the fastest of ``tiles``; the interpreter takes the first."""
    if len(tiles) > 1 and _times():
        kernel = _tuned(kernel, tiles)
    else:
        constants |= tiles[0].all_kwargs()
    visible(kernel)[grid](*arguments, **constants)


def _times() -> bool:
    """Whether kernels run on a GPU, which can be timed, and not in the interpreter."""
    return not triton.knobs.runtime.interpret


@cache
def _tuned(
    kernel: triton.runtime.JITFunction, tiles: tuple[triton.Config, ...]
) -> triton.runtime.Autotuner:
    # Triton 3.9 rejects keys that are not arguments of the kernel.
    key = [name for name in _KEY if name in kernel.arg_names]
    return triton.autotune(configs=list(tiles), key=key, cache_results=True)(kernel)
