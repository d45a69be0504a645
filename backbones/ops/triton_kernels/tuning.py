"""Tiles of the kernels: the fastest of a few, timed on the GPU when a kernel first meets a size.

What is timed counts for all maps of the same channels, groups, precision and size to a factor of
two, and is kept on disk by Triton. Kernels that sum over a whole map have no choice: the gradients
of weights are the same whatever was timed.
"""

from collections.abc import Callable
from functools import cache

import torch
import triton

# What a timing counts for, besides the precision.
_KEY = ["C", "S", "G", "D", "N", "heads", "K", "gather", "flip", "back", "bucket"]


def tile(warps: int = 4, **blocks: int) -> triton.Config:
    """Sides of a tile and the warps that share it."""
    return triton.Config(blocks, num_warps=warps)


def bucket(x: torch.Tensor) -> int:
    """Maps ``(B, H, W, ...)`` of one bucket share a timing: their sizes to a factor of two."""
    return (x.shape[1] * x.shape[2]).bit_length()


def run(
    kernel: triton.runtime.JITFunction,
    grid: Callable[[dict], tuple[int, ...]],
    tiles: tuple[triton.Config, ...],
    *arguments: torch.Tensor | int | float,
    **constants: object,
) -> None:
    """Run a kernel by the fastest of ``tiles``; by the first where nothing can be timed."""
    if len(tiles) > 1 and _times():
        kernel = _tuned(kernel, tiles)
    else:
        constants |= tiles[0].all_kwargs()
    kernel[grid](*arguments, **constants)


def _times() -> bool:
    """Whether there is a GPU at work, and not the interpreter."""
    return not triton.knobs.runtime.interpret


@cache
def _tuned(
    kernel: triton.runtime.JITFunction, tiles: tuple[triton.Config, ...]
) -> triton.runtime.Autotuner:
    # Triton 3.9 refuses names that are no arguments of the kernel.
    key = [name for name in _KEY if name in kernel.arg_names]
    return triton.autotune(configs=list(tiles), key=key, cache_results=True)(kernel)
