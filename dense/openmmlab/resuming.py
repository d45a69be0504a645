"""Bit-for-bit resuming for mmengine: data order and random draws follow from the run's seed.

A sample's augmentation is seeded by its position in the run, an iteration's dropout and mixup by
the iteration number. A checkpoint therefore stores the iteration only, results do not depend on
the number of workers, and samples already trained on are skipped without being read.
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

from dense.seeding import ITERATION, SAMPLE, Place, mixed, seed_all


@DATA_SAMPLERS.register_module()
class ResumableSampler(Sampler):
    """Sampler that can start at any position of an epoch or of an infinite run.

    >>> sampler = dict(type="ResumableSampler", infinite=True)  # of a train_dataloader

    Epoch ``e`` is the permutation seeded by ``seed + e``; rank ``r`` takes every ``world_size``-th
    index from ``r`` on, as in MMEngine's samplers.

    Args:
        dataset: the data set to sample from.
        shuffle: False keeps the data set's order.
        seed: None draws a random seed shared by all processes.
        infinite: never stop, for iteration-based training. Otherwise yield the epoch given to
            ``set_epoch``, padded to the same length in all processes.

    Attributes:
        start: number of this process's samples to skip in the next ``iter()``.
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
        """Select the epoch of the next ``iter()``."""
        self.epoch = epoch

    def _order(self, turn: int) -> list[int]:
        if not self.shuffle:
            return list(range(self.size))
        generator = torch.Generator().manual_seed(self.seed + turn)
        return torch.randperm(self.size, generator=generator).tolist()


@HOOKS.register_module()
class SeedEveryIteration(Hook):
    """Hook that seeds all random generators by run seed, iteration and rank."""

    priority = "VERY_HIGH"

    def before_train_iter(
        self, runner: Runner, batch_idx: int, data_batch: dict | tuple | list | None = None
    ) -> None:
        """Seed before the iteration draws anything."""
        number = runner.iter * runner.world_size + runner.rank
        seed_all(mixed(runner.seed, ITERATION, number))


@LOOPS.register_module()
class ResumableIterTrainLoop(IterBasedTrainLoop):
    """MMEngine's IterBasedTrainLoop; a resumed run skips trained samples without reading them.

    The data loader needs a :class:`ResumableSampler`.
    """

    def run(self) -> torch.nn.Module:
        """Train from the current iteration on."""
        if self._iter > 0:
            sampler = self.dataloader.sampler
            sampler.seed = self.runner.seed
            sampler.start = self._iter * self.dataloader.batch_size
            self.dataloader_iterator = _Advanced(self.dataloader, self._iter)
        return super().run()


@LOOPS.register_module()
class ResumableEpochTrainLoop(EpochBasedTrainLoop):
    """MMEngine's EpochBasedTrainLoop that can also resume in the middle of an epoch.

    That takes a :class:`ResumableSampler`; with any other sampler the epoch starts anew.
    """

    def run(self) -> torch.nn.Module:
        """Train from the current iteration on."""
        # An iteration-based checkpoint written at the end of an epoch does not count that epoch.
        self._epoch = max(self._epoch, self._iter // len(self.dataloader))
        return super().run()

    def run_epoch(self) -> None:
        """Run one epoch, or the rest of a resumed one."""
        sampler = self.dataloader.sampler
        done = self._iter - self._epoch * len(self.dataloader)
        resumable = isinstance(sampler, ResumableSampler)
        if resumable:
            # Built before resuming restored the run's first seed.
            sampler.seed = self.runner.seed
        if not resumable or not 0 < done < len(self.dataloader):
            return super().run_epoch()
        sampler.start = done * self.dataloader.batch_size
        self.runner.call_hook("before_train_epoch")
        self.runner.model.train()
        for index, batch in enumerate(self.dataloader, start=done):
            self.run_iter(index, batch)
        self.runner.call_hook("after_train_epoch")
        self._epoch += 1


class _Advanced(_InfiniteDataloaderIterator):
    """Returns None for the batches MMEngine's loop skips; the sampler has skipped them already."""

    def __init__(self, dataloader: Any, skipped: int):
        super().__init__(dataloader)
        self._skipped = skipped

    def __next__(self) -> Any:
        if self._skipped:
            self._skipped -= 1
            return None
        return super().__next__()

    def skip_iter(self, num_iters: int) -> None:
        """What onedl-mmengine's loop calls instead of asking for those batches."""
        self._skipped = max(0, self._skipped - num_iters)
