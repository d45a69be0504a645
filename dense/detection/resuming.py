"""Bit-for-bit resuming in Detectron2: batches from any iteration on, earlier ones never read.

Detectron2's loaders draw random numbers in worker processes and group images by aspect ratio after
loading them. Here indices are grouped before loading, by the sizes in the annotations, so batches
do not depend on the number of workers and skipped batches cost nothing.
"""

import itertools
import logging
from collections.abc import Iterator
from typing import Any

import torch
from detectron2.data.build import trivial_batch_collator
from detectron2.data.common import AspectRatioGroupedDataset, MapDataset, ToIterableDataset
from detectron2.engine import HookBase
from detectron2.utils import comm
from torch.utils.data import DataLoader, Dataset, Sampler

from dense.seeding import ITERATION, SAMPLE, Place, SeededDataset, mixed, seed_all

_logger = logging.getLogger(__name__)


def resumable(loader: Any, seed: int, first: int) -> Any:
    """A Detectron2 training loader that starts at a given iteration.

    Args:
        loader: result of ``build_detection_train_loader``, not iterated over yet.
        seed: the run's seed, equal in all processes. It determines the data order (if the sampler
            has a seed) and each sample's augmentation.
        first: the first iteration, from 0.

    Returns:
        An iterable of batches as ``loader`` has them. ``loader`` itself, with a warning if
        ``first`` is not 0, if it has another type or the annotations have no image sizes.
    """
    grouped = isinstance(loader, AspectRatioGroupedDataset)
    inner = loader.dataset if grouped else loader
    items = inner.dataset if isinstance(inner, DataLoader) else None
    if not isinstance(items, ToIterableDataset) or (grouped and not _has_sizes(items.dataset)):
        if first:
            _logger.warning(
                f"the order of the data is not resumed: {type(loader).__name__} is not a loader of "
                "build_detection_train_loader over annotations with image sizes"
            )
        return loader
    if hasattr(items.sampler, "_seed"):
        items.sampler._seed = seed
    sizes = _annotations(items.dataset) if grouped else None
    return DataLoader(
        SeededDataset(items.dataset),
        batch_sampler=_Batches(items.sampler, loader.batch_size, sizes, seed, first),
        num_workers=inner.num_workers,
        collate_fn=trivial_batch_collator if grouped else inner.collate_fn,
        pin_memory=inner.pin_memory,
        timeout=inner.timeout,
        # Otherwise building an iterator would draw from the process's generator.
        generator=torch.Generator(),
        prefetch_factor=inner.prefetch_factor,
        persistent_workers=inner.persistent_workers,
        multiprocessing_context=inner.multiprocessing_context,
    )


class SeedSteps(HookBase):
    """Hook that seeds all random generators by run seed, iteration and rank."""

    def __init__(self, seed: int):
        self.seed = seed

    def before_step(self) -> None:
        """Seed before the step draws anything."""
        number = self.trainer.iter * comm.get_world_size() + comm.get_rank()
        seed_all(mixed(self.seed, ITERATION, number))


class _Batches(Sampler):
    """Batches of places, without the first ``first`` batches.

    If ``sizes`` is given, wide and other images go into separate batches.
    """

    def __init__(
        self, sampler: Sampler, batch_size: int, sizes: Dataset | None, seed: int, first: int
    ):
        self.sampler, self.batch_size, self.sizes = sampler, batch_size, sizes
        self.seed, self.first = seed, first
        self._wide: dict[int, bool] = {}

    def __iter__(self) -> Iterator[list[Place]]:
        yield from itertools.islice(self._all(), self.first, None)

    def _all(self) -> Iterator[list[Place]]:
        rank, world_size = comm.get_rank(), comm.get_world_size()
        buckets: dict[bool, list[Place]] = {True: [], False: []}
        for number, index in enumerate(self.sampler):
            bucket = buckets[self.sizes is not None and self._is_wide(index)]
            bucket.append(Place(index, mixed(self.seed, SAMPLE, number * world_size + rank)))
            if len(bucket) == self.batch_size:
                yield bucket[:]
                bucket.clear()

    def _is_wide(self, index: int) -> bool:
        if index not in self._wide:
            annotation = self.sizes[index]
            self._wide[index] = annotation["width"] > annotation["height"]
        return self._wide[index]


def _annotations(dataset: Dataset) -> Dataset:
    """The annotation dicts, without the mapper that reads the images."""
    return dataset._dataset if isinstance(dataset, MapDataset) else dataset


def _has_sizes(dataset: Dataset) -> bool:
    first = _annotations(dataset)[0]
    return isinstance(first, dict) and {"width", "height"} <= first.keys()
