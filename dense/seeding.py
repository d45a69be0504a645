"""Seeds of single samples and iterations, so that a resumed run repeats the random draws."""

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

# Part of a seed's hash: a sample and an iteration of equal number get different seeds.
SAMPLE, ITERATION = 0, 1

_CPU = torch.random.default_generator


def mixed(*numbers: int) -> int:
    """Hash non-negative integers into one 32-bit seed; close numbers give unrelated seeds."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


def seed_all(seed: int) -> None:
    """Seed Python, NumPy and PyTorch, on the CPU and on all GPUs."""
    _seed_cpu(seed)
    if torch.cuda.is_available():
        torch.cuda.manual_seed_all(seed)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed the CPU generators of Python, NumPy and PyTorch; restore their states on exit."""
    before = random.getstate(), np.random.get_state(), _CPU.get_state()
    _seed_cpu(seed)
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])
        _CPU.set_state(before[2])


def _seed_cpu(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)
    _CPU.manual_seed(seed)
