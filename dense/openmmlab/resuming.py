"""Runs that go on bit for bit: their place in the data, and what they draw, follow from the seed.

A sample's augmentation is seeded by its place in the run, an iteration's dropout and mixing by its
number. So nothing but the iteration has to be remembered, the number of worker processes does not
matter, and data that was trained on is skipped instead of read again.
"""

import itertools
from collections.abc import Iterator
from typing import Any

import torch
from mmengine.dist import get_dist_info, sync_random_seed
from mmengine.hooks import Hook
from mmengine.registry import DATA_SAMPLERS, HOOKS, LOOPS
from mmengine.runner import EpochBasedTrainLoop, IterBasedTrainLoop, Runner
from mmengine.runner.loops import _InfiniteDataloaderIterator
from torch.utils.data import Dataset, Sampler

from dense.seeding import ITERATION, SAMPLE, mixed, seed_all, seeded


class Place(int):
    """An index into a data set that knows the seed of its sample."""

    seed: int

    def __new__(cls, index: int, seed: int) -> "Place":
        place = super().__new__(cls, index)
        place.seed = seed
        return place

    def __reduce__(self) -> tuple:
        return Place, (int(self), self.seed)


@DATA_SAMPLERS.register_module()
class ResumableSampler(Sampler):
    """Shuffled indices, of one pass or without end, from any place on.

    Pass ``p`` over the data is the permutation of ``seed + p``; processes take turns in it, as
    MMEngine's samplers have it.

    Args:
        dataset: what is sampled.
        shuffle: False keeps the order of the data set.
        seed: None agrees on a random one among all processes.
        infinite: without end, for iteration-based training; else one pass after ``set_epoch``,
            filled up so that all processes have as many.

    Attributes:
        start: samples of this process to leave out in the next iteration over the sampler.
    """

    def __init__(
        self,
        dataset: Dataset,
        shuffle: bool = True,
        seed: int | None = None,
        infinite: bool = False,
    ):
        self.rank, self.world_size = get_dist_info()
        self.size = len(dataset)
        self.shuffle, self.infinite = shuffle, infinite
        self.seed = sync_random_seed() if seed is None else seed
        self.epoch = self.start = 0

    def __iter__(self) -> Iterator[Place]:
        start, self.start = self.start, 0
        order, current = None, None
        for step in itertools.count(start) if self.infinite else range(start, len(self)):
            place = step * self.world_size + self.rank
            if self.infinite:
                turn, at = divmod(place, self.size)
            else:
                turn, at = self.epoch, place % self.size
                place += self.epoch * len(self) * self.world_size
            if turn != current:
                order, current = self._order(turn), turn
            yield Place(order[at], mixed(self.seed, SAMPLE, place))

    def __len__(self) -> int:
        return self.size if self.infinite else -(-self.size // self.world_size)

    def set_epoch(self, epoch: int) -> None:
        """The pass that the next iteration is."""
        self.epoch = epoch

    def _order(self, turn: int) -> list[int]:
        if not self.shuffle:
            return list(range(self.size))
        generator = torch.Generator().manual_seed(self.seed + turn)
        return torch.randperm(self.size, generator=generator).tolist()


class SeededDataset(Dataset):
    """A data set whose samples are drawn with the seed of their place, whoever draws them.

    The generators of the process are left as they were.
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
        # What MMEngine asks of a data set, its metainfo above all; not while being unpickled.
        if name == "dataset":
            raise AttributeError(name)
        return getattr(self.dataset, name)


@HOOKS.register_module()
class SeedEveryIteration(Hook):
    """Seed all generators from the run's seed, the iteration and the rank."""

    priority = "VERY_HIGH"

    def before_train_iter(
        self, runner: Runner, batch_idx: int, data_batch: dict | tuple | list | None = None
    ) -> None:
        """Before anything of the iteration is drawn."""
        number = runner.iter * runner.world_size + runner.rank
        seed_all(mixed(runner.seed, ITERATION, number))


@LOOPS.register_module()
class ResumableIterTrainLoop(IterBasedTrainLoop):
    """MMEngine's loop over iterations; on resuming the sampler skips what was trained on.

    Its data loader's sampler is a :class:`ResumableSampler`.
    """

    def run(self) -> torch.nn.Module:
        """Train from where the run stands."""
        if self._iter > 0:
            sampler = self.dataloader.sampler
            sampler.seed = self.runner.seed
            sampler.start = self._iter * self.dataloader.batch_size
            self.dataloader_iterator = _Advanced(self.dataloader, self._iter)
        return super().run()


@LOOPS.register_module()
class ResumableEpochTrainLoop(EpochBasedTrainLoop):
    """MMEngine's loop over epochs; on resuming in the middle of one the sampler skips its start.

    Its data loader's sampler is a :class:`ResumableSampler`, or a stream's own.
    """

    def run(self) -> torch.nn.Module:
        """Train from where the run stands."""
        # A checkpoint by iterations, written at the end of an epoch, calls that epoch unfinished.
        self._epoch = max(self._epoch, self._iter // len(self.dataloader))
        return super().run()

    def run_epoch(self) -> None:
        """One epoch, or what is left of it."""
        sampler = self.dataloader.sampler
        done = self._iter - self._epoch * len(self.dataloader)
        if not isinstance(sampler, ResumableSampler) or not 0 < done < len(self.dataloader):
            self._use_the_runs_seed(sampler)
            return super().run_epoch()
        self._use_the_runs_seed(sampler)
        sampler.start = done * self.dataloader.batch_size
        self.runner.call_hook("before_train_epoch")
        self.runner.model.train()
        for index, batch in enumerate(self.dataloader, start=done):
            self.run_iter(index, batch)
        self.runner.call_hook("after_train_epoch")
        self._epoch += 1

    def _use_the_runs_seed(self, sampler: Any) -> None:
        # A resumed run has its first seed again, which the sampler was built without.
        if isinstance(sampler, ResumableSampler):
            sampler.seed = self.runner.seed


class _Advanced(_InfiniteDataloaderIterator):
    """Gives nothing for the batches that MMEngine's loop means to skip: the sampler has."""

    def __init__(self, dataloader: Any, skipped: int):
        super().__init__(dataloader)
        self._skipped = skipped

    def __next__(self) -> Any:
        if self._skipped:
            self._skipped -= 1
            return None
        return super().__next__()
