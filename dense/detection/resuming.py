"""Detection that goes on bit for bit: data from any iteration on, without reading what came before.

Detectron2's loaders draw in their worker processes and group images by aspect ratio after loading
them. Here indices are grouped before anything is loaded, by the sizes that the annotations give:
the same batches come out whatever the number of workers, and those trained on already cost nothing.
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

from dense.seeding import ITERATION, SAMPLE, mixed, seed_all, seeded

_logger = logging.getLogger(__name__)


def resumable(loader: Any, seed: int, first: int) -> Any:
    """The batches of one of Detectron2's training loaders, from an iteration on.

    Args:
        loader: what ``build_detection_train_loader`` returned and nobody has iterated over.
        seed: of the run, the same in all processes. The order follows from it, if the sampler
            shuffles by a seed, and a sample's augmentation from it and the sample's place.
        first: the iteration to begin with, from 0.

    Returns:
        An iterable of lists of mapped dicts, as the loader's; the loader itself, and a warning in
        the log, where it is of another build or has no sizes to group by.
    """
    grouped = isinstance(loader, AspectRatioGroupedDataset)
    inner = loader.dataset if grouped else loader
    items = inner.dataset if isinstance(inner, DataLoader) else None
    if not isinstance(items, ToIterableDataset) or (grouped and not _has_sizes(items.dataset)):
        if first:
            _logger.warning(
                f"the order of the data is not resumed: {type(loader).__name__} is no loader of "
                "Detectron2's build_detection_train_loader over data with sizes"
            )
        return loader
    if hasattr(items.sampler, "_seed"):
        items.sampler._seed = seed
    sizes = _annotations(items.dataset) if grouped else None
    batches = _Batches(items.sampler, loader.batch_size, sizes, first)
    workers = {}
    if inner.num_workers:
        workers = {
            "prefetch_factor": inner.prefetch_factor,
            "persistent_workers": inner.persistent_workers,
            "multiprocessing_context": inner.multiprocessing_context,
        }
    return DataLoader(
        _Seeded(items.dataset, seed),
        batch_sampler=batches,
        num_workers=inner.num_workers,
        collate_fn=trivial_batch_collator if grouped else inner.collate_fn,
        pin_memory=inner.pin_memory,
        timeout=inner.timeout,
        # Its own, so that building an iterator draws nothing from the process's.
        generator=torch.Generator(),
        **workers,
    )


class SeedSteps(HookBase):
    """Seed all generators before every step, from the run's seed, the iteration and the rank."""

    def __init__(self, seed: int):
        self.seed = seed

    def before_step(self) -> None:
        """Before anything of the step is drawn."""
        number = self.trainer.iter * comm.get_world_size() + comm.get_rank()
        seed_all(mixed(self.seed, ITERATION, number))


class _Batches(Sampler):
    """Lists of index and place in the run; the first ones are counted and left out.

    Wide images and others go into batches of their own where sizes are given.
    """

    def __init__(self, sampler: Sampler, batch_size: int, sizes: Dataset | None, first: int):
        self.sampler, self.batch_size, self.sizes, self.first = sampler, batch_size, sizes, first
        self._wide: dict[int, bool] = {}

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        yield from itertools.islice(self._all(), self.first, None)

    def _all(self) -> Iterator[list[tuple[int, int]]]:
        rank, world_size = comm.get_rank(), comm.get_world_size()
        buckets: dict[bool, list[tuple[int, int]]] = {True: [], False: []}
        for number, index in enumerate(self.sampler):
            bucket = buckets[self.sizes is not None and self._is_wide(index)]
            bucket.append((index, number * world_size + rank))
            if len(bucket) == self.batch_size:
                yield bucket[:]
                bucket.clear()

    def _is_wide(self, index: int) -> bool:
        if index not in self._wide:
            annotation = self.sizes[index]
            self._wide[index] = annotation["width"] > annotation["height"]
        return self._wide[index]


class _Seeded(Dataset):
    """Samples by index and place, drawn with the seed of the place."""

    def __init__(self, dataset: Dataset, seed: int):
        self.dataset, self.seed = dataset, seed

    def __getitem__(self, drawn: tuple[int, int]) -> Any:
        index, place = drawn
        with seeded(mixed(self.seed, SAMPLE, place)):
            return self.dataset[index]

    def __len__(self) -> int:
        return len(self.dataset)


def _annotations(dataset: Dataset) -> Dataset:
    """The dicts before they are mapped, which is where the image is read."""
    return dataset._dataset if isinstance(dataset, MapDataset) else dataset


def _has_sizes(dataset: Dataset) -> bool:
    first = _annotations(dataset)[0]
    return isinstance(first, dict) and {"width", "height"} <= first.keys()
