"""Each sample and each iteration draws numbers of its own, and the same ones in a resumed run."""

import pickle
import random
from collections.abc import Callable
from itertools import product
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from dense.seeding import ITERATION, SAMPLE, Place, SeededDataset, mixed, seed_all, seeded

PROCESSES, ITERATIONS, EPOCHS = 2, 5, 3
# The first of each generator with the seed 5.
NUMBERS = [0.6229017, 0.2219932, 0.8302519]


def openmmlab_iteration(seed: int, rank: int, iteration: int, patch) -> torch.Tensor:
    from dense.openmmlab.resuming import SeedEveryIteration

    runner = SimpleNamespace(seed=seed, rank=rank, world_size=PROCESSES, iter=iteration)
    SeedEveryIteration().before_train_iter(runner, 0)
    return torch.rand(())


def detection_iteration(seed: int, rank: int, iteration: int, patch) -> torch.Tensor:
    from dense.detection import resuming

    patch.setattr(resuming.comm, "get_rank", lambda: rank)
    patch.setattr(resuming.comm, "get_world_size", lambda: PROCESSES)
    hook = resuming.SeedSteps(seed)
    hook.trainer = SimpleNamespace(iter=iteration)
    hook.before_step()
    return torch.rand(())


@pytest.mark.parametrize(
    "framework, drawn",
    [("mmengine", openmmlab_iteration), ("detectron2", detection_iteration)],
)
def test_an_iteration_of_a_process_has_its_own_numbers(
    framework: str, drawn: Callable, monkeypatch
):
    pytest.importorskip(framework)
    places = list(product((0, 1), range(PROCESSES), range(ITERATIONS)))
    with seeded(0):
        found = [float(drawn(*place, monkeypatch)) for place in places]
        # In another order, as after a kill.
        again = [float(drawn(*place, monkeypatch)) for place in places[::-1]]
    assert again[::-1] == found and len(set(found)) == len(places)
    seeds = {mixed(seed, kind, 3) for seed, kind in product((0, 1), (SAMPLE, ITERATION))}
    assert len(seeds) == 4


def openmmlab_samples(seed: int, rank: int, patch) -> list:
    from dense.openmmlab import resuming

    patch.setattr(resuming, "get_dist_info", lambda: (rank, PROCESSES))
    sampler, found = resuming.ResumableSampler(range(8), seed=seed), []
    for epoch in range(EPOCHS):
        sampler.set_epoch(epoch)
        found += list(sampler)
    return found


def detection_samples(seed: int, rank: int, patch) -> list:
    from dense.detection import resuming

    patch.setattr(resuming.comm, "get_rank", lambda: rank)
    patch.setattr(resuming.comm, "get_world_size", lambda: PROCESSES)
    order = [index for _ in range(EPOCHS) for index in range(rank, 8, PROCESSES)]
    return [place for batch in resuming._Batches(order, 2, None, seed, 0) for place in batch]


@pytest.mark.parametrize(
    "framework, samples", [("mmengine", openmmlab_samples), ("detectron2", detection_samples)]
)
def test_a_sample_has_another_seed_in_each_process_and_epoch(
    framework: str, samples: Callable, monkeypatch
):
    pytest.importorskip(framework)
    runs = product((0, 1), range(PROCESSES))
    found = [place for run in runs for place in samples(*run, monkeypatch)]
    assert len({place.seed for place in found}) == len(found) == 2 * EPOCHS * 8
    for epoch in np.split(np.array(found[: EPOCHS * 8 // PROCESSES]), EPOCHS):
        assert len(set(epoch.tolist())) == 8 // PROCESSES


def test_epochs_have_orders_of_their_own():
    pytest.importorskip("mmengine")
    from dense.openmmlab.resuming import ResumableSampler

    sampler, orders = ResumableSampler(range(50), seed=1), set()
    for epoch in range(EPOCHS):
        sampler.set_epoch(epoch)
        orders.add(tuple(map(int, sampler)))
    endless = list(
        zip(ResumableSampler(range(50), seed=1, infinite=True), range(150), strict=False)
    )
    indices = [int(place) for place, _ in endless]
    assert {tuple(indices[i : i + 50]) for i in (0, 50, 100)} == orders and len(orders) == EPOCHS


def drawn() -> list[float]:
    """A number of each generator."""
    return [random.random(), float(np.random.rand()), float(torch.rand(()))]


def test_seeds_are_the_same_on_every_machine():
    """A resumed run draws what the run before it would have, in whatever version."""
    assert (SAMPLE, ITERATION) == (0, 1)
    assert [mixed(0), mixed(1, 2), mixed(2, 1)] == [2968811710, 1596810411, 307626447]
    with seeded(5):
        assert drawn() == pytest.approx(NUMBERS)


def test_a_seed_is_of_all_generators_and_ends_with_its_block(monkeypatch):
    on_gpus = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "manual_seed_all", on_gpus.append)
    with seeded(7):
        before = drawn()
        for _ in range(2):
            with pytest.raises(KeyError), seeded(5):
                assert drawn() == pytest.approx(NUMBERS)
                raise KeyError
        after = drawn()
    assert on_gpus == []
    with seeded(7):
        assert [drawn(), drawn()] == [before, after]
        seed_all(5)
        assert drawn() == pytest.approx(NUMBERS) and on_gpus == [5]
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        seed_all(6)
        assert on_gpus == [5]


class Noisy(list):
    classes = ("a", "b")

    def __getitem__(self, index):
        assert type(index) is not Place
        return index, drawn()


def test_a_place_brings_its_seed_through_processes():
    place = pickle.loads(pickle.dumps(Place(3, 5)))
    assert (place, place.seed) == (3, 5)
    data = pickle.loads(pickle.dumps(SeededDataset(Noisy("abcd"))))
    assert len(data) == 4 and data.classes == ("a", "b")
    with seeded(7):
        before = drawn()
    with seeded(7):
        index, numbers = data[place]
        assert index == 3 and type(index) is int and numbers == pytest.approx(NUMBERS)
        # The process's own numbers go on as if nothing had been drawn.
        assert data[2] == (2, before)
    assert not hasattr(data, "absent") and not hasattr(
        SeededDataset.__new__(SeededDataset), "dataset"
    )
