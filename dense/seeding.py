"""Seeds of single samples and iterations, so that a resumed run repeats the random draws."""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

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


class Place(int):
    """A data set index that carries the seed of its sample."""

    seed: int

    def __new__(cls, index: int, seed: int) -> "Place":
        place = super().__new__(cls, index)
        place.seed = seed
        return place

    def __reduce__(self) -> tuple:
        return Place, (int(self), self.seed)


class SeededDataset(Dataset):
    """Wraps a data set: a sample at a :class:`Place` is drawn with the place's seed.

    The state of the process's random generators is restored afterwards.
    """

    def __init__(self, dataset: Dataset):
        self.dataset = dataset

    def __getitem__(self, index: int) -> Any:
        if not isinstance(index, Place):
            return self.dataset[index]
        with seeded(index.seed):
            return self.dataset[int(index)]

    def __len__(self) -> int:
        return len(self.dataset)

    def __getattr__(self, name: str) -> Any:
        # MMEngine reads metainfo and more; while unpickling, self.dataset is not set yet.
        if name == "dataset":
            raise AttributeError(name)
        return getattr(self.dataset, name)


def _seed_cpu(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)
    _CPU.manual_seed(seed)
