"""Order, seeds and rates of trainings at any place, without a training."""

from types import SimpleNamespace

import pytest
import torch
from mmengine.runner import EpochBasedTrainLoop, IterBasedTrainLoop

from dense.openmmlab import resuming
from dense.openmmlab.resuming import ResumableSampler
from dense.openmmlab.schedule import WarmupCosineLR, without_empty
from dense.seeding import ITERATION, SAMPLE, mixed

DATA = list(range(5))


def test_data_that_are_not_shuffled_keep_their_order():
    assert list(map(int, ResumableSampler(DATA, shuffle=False, seed=1))) == DATA
    endless = ResumableSampler(DATA, shuffle=False, seed=1, infinite=True)
    assert [int(place) for place, _ in zip(endless, range(12), strict=False)] == (DATA * 3)[:12]
    assert (len(endless), len(ResumableSampler(DATA))) == (5, 5)


def test_an_order_is_of_its_epoch_and_the_seed(monkeypatch):
    def order(seed):
        return torch.randperm(5, generator=torch.Generator().manual_seed(seed)).tolist()

    sampler = ResumableSampler(DATA, seed=3)
    for epoch in (0, 2):
        sampler.set_epoch(epoch)
        places = list(sampler)
        assert [int(place) for place in places] == order(3 + epoch)
        assert [place.seed for place in places] == [
            mixed(3, SAMPLE, 5 * epoch + step) for step in range(5)
        ]
    endless = ResumableSampler(DATA, seed=3, infinite=True)
    places = [place for place, _ in zip(endless, range(7), strict=False)]
    assert [int(place) for place in places] == order(3) + order(4)[:2]
    assert [place.seed for place in places] == [mixed(3, SAMPLE, step) for step in range(7)]
    # All processes draw one seed.
    monkeypatch.setattr(resuming, "sync_random_seed", lambda: 44)
    assert ResumableSampler(DATA).seed == 44 and ResumableSampler(DATA, seed=0).seed == 0


def test_padded_places_have_seeds_of_their_own(monkeypatch):
    found = []
    for rank in range(3):
        monkeypatch.setattr(resuming, "get_dist_info", lambda r=rank: (r, 3))
        sampler = ResumableSampler(DATA, shuffle=False, seed=3)
        sampler.set_epoch(1)
        assert len(sampler) == 2
        found += [(step * 3 + rank, int(place), place.seed) for step, place in enumerate(sampler)]
    # The second epoch of 6 places, of which the last is the first again.
    assert sorted(found) == [(n, n % 5, mixed(3, SAMPLE, 6 + n)) for n in range(6)]


def test_an_iteration_of_each_process_has_its_seed(monkeypatch):
    seeds = []
    monkeypatch.setattr(resuming, "seed_all", seeds.append)
    hook = resuming.SeedEveryIteration()
    for done, rank in ((0, 0), (0, 1), (4, 1)):
        hook.before_train_iter(SimpleNamespace(iter=done, rank=rank, world_size=2, seed=9), 0)
    assert seeds == [mixed(9, ITERATION, number) for number in (0, 1, 9)]


class Loader(list):
    """Batches of two, of what its sampler begins with."""

    batch_size = 2

    def __init__(self, sampler):
        super().__init__("abc")
        self.sampler = sampler

    def __iter__(self):
        return iter("abc"[self.sampler.start // 2 :])


class Runner(SimpleNamespace):
    """Notes what a loop asks for."""

    def __init__(self):
        self.done, self.seed, self.val_loop = [], 7, None
        self.model = SimpleNamespace(train=lambda: self.done.append("train"))

    def call_hook(self, name, **_):
        self.done.append(name)


def loop_of(kind, done, sampler, epoch=0, epochs=2):
    loop = kind.__new__(kind)
    loop.__dict__ |= dict(_iter=done, _epoch=epoch, _max_epochs=epochs, stop_training=False)
    loop.__dict__ |= dict(dataloader=Loader(sampler), _runner=Runner(), val_interval=1)
    loop.__dict__ |= dict(dynamic_milestones=[0], dynamic_intervals=[1])

    def run_iter(*batch):
        loop.runner.done.append(batch)
        loop._iter += 1

    loop.run_iter = run_iter
    return loop


WHOLE = ["before_train_epoch", "train", (0, "a"), (1, "b"), (2, "c"), "after_train_epoch"]


@pytest.mark.parametrize(
    ("done", "epoch", "expected"),
    [
        (0, 0, [*WHOLE, *WHOLE]),
        # The first epoch's rest, and nothing before it.
        (1, 0, [*WHOLE[:2], *WHOLE[3:], *WHOLE]),
        (2, 0, [*WHOLE[:2], *WHOLE[4:], *WHOLE]),
        # At its end, whether the checkpoint counts it or not.
        *((3, 0, WHOLE), (3, 1, WHOLE)),
        (5, 1, [*WHOLE[:2], *WHOLE[4:]]),
        (6, 1, []),
    ],
)
def test_an_epoch_goes_on_where_it_was(done, epoch, expected):
    sampler = ResumableSampler(DATA, seed=1)
    loop = loop_of(resuming.ResumableEpochTrainLoop, done, sampler, epoch)
    starts, epoch_of = [], type(loop).run_epoch

    def run_epoch():
        epoch_of(loop)
        starts.append(sampler.start)
        sampler.start = 0

    loop.run_epoch = run_epoch
    loop.run()
    assert loop.runner.done == ["before_train", *expected, "after_train"]
    assert (loop._epoch, loop._iter) == (2, 6)
    # Two samples a batch.
    assert starts[:1] == ([2 * (done % 3)] if expected else [])
    assert sampler.seed == (7 if expected else 1)


def test_with_another_sampler_an_epoch_begins_anew():
    sampler = SimpleNamespace(start=0)
    loop = loop_of(resuming.ResumableEpochTrainLoop, 1, sampler, epochs=1)
    loop.run()
    assert loop.runner.done == ["before_train", *WHOLE, "after_train"]
    assert vars(sampler) == {"start": 0}


@pytest.mark.parametrize("done", [0, 2])
def test_iterations_go_on_where_they_were(done, monkeypatch):
    sampler = ResumableSampler(DATA, seed=1, infinite=True)
    loop = loop_of(resuming.ResumableIterTrainLoop, done, sampler)
    loop.dataloader_iterator = None
    monkeypatch.setattr(IterBasedTrainLoop, "run", lambda self: "trained")
    monkeypatch.setattr(resuming, "_Advanced", lambda *given: given)
    assert loop.run() == "trained"
    found = sampler.seed, sampler.start, loop.dataloader_iterator
    assert found == ((7, 4, (loop.dataloader, 2)) if done else (1, 0, None))


def test_the_model_of_a_training_by_epochs_is_returned(monkeypatch):
    monkeypatch.setattr(EpochBasedTrainLoop, "run", lambda self: "trained")
    assert loop_of(resuming.ResumableEpochTrainLoop, 1, None).run() == "trained"


@pytest.mark.parametrize("ways", ["asked", "skipped", "both"])
def test_batches_that_were_trained_on_are_passed_by(ways):
    """MMEngine asks for them one by one, its maintained fork has them skipped at once."""
    batches = resuming._Advanced(torch.utils.data.DataLoader([1, 2]), 3)
    if ways == "skipped":
        batches.skip_iter(5)
    if ways == "both":
        batches.skip_iter(1)
    passed = {"asked": 3, "skipped": 0, "both": 2}[ways]
    assert [next(batches) for _ in range(passed)] == [None] * passed
    assert [int(next(batches)) for _ in range(2)] == [1, 2]


# Schedules

BY_EPOCH = dict(type="LinearLR", convert_to_iter_based=True)


@pytest.mark.parametrize(
    ("schedule", "stays"),
    [
        (dict(BY_EPOCH, end=0.1), False),
        (dict(BY_EPOCH, end=0.125), True),
        (dict(BY_EPOCH, begin=0.125, end=0.24), False),
        (dict(BY_EPOCH, begin=0.125, end=0.25), True),
        (dict(BY_EPOCH, begin=1, end=1), False),
        (dict(BY_EPOCH, begin=1), True),
        (BY_EPOCH, True),
        (dict(type="LinearLR", end=0), True),
        (dict(BY_EPOCH, convert_to_iter_based=False, end=0), True),
        (object(), True),
    ],
)
def test_a_schedule_without_an_iteration_is_left_out(schedule, stays):
    other = dict(type="PolyLR")
    left = without_empty([schedule, other], range(8))
    assert left == ([schedule] if stays else []) + [other]


def test_a_cosine_by_epochs_is_one_by_iterations():
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    given = dict(warmup_lr=0.1, eta_min=0.2, convert_to_iter_based=True)
    made = WarmupCosineLR.build_iter_from_epoch(
        optimizer, warmup=0.375, end=1.25, epoch_length=10, by_epoch=True, **_known(given)
    )
    assert (made.warmup, made.end, made.by_epoch, made.warmup_prefix) == (4, 12, False, False)
    made = WarmupCosineLR(optimizer, warmup=2, end=4, **_known(given))
    assert made.by_epoch and (made.begin, made.end) == (0, 4)


def _known(given):
    return {key: value for key, value in given.items() if key != "convert_to_iter_based"}


@pytest.mark.parametrize("prefix", [False, True])
def test_rates_of_a_short_training(prefix):
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    schedule = WarmupCosineLR(
        optimizer, warmup=2, warmup_lr=0.2, eta_min=0.1, end=6, warmup_prefix=prefix
    )
    rates = []
    for _ in range(6):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    # cos of thirds of a half turn from step 0, or of quarters from step 2.
    cosine = [1, 2**-0.5, 0, -(2**-0.5)] if prefix else [0.5, 0, -0.5, -(3**0.5) / 2]
    expected = [0.2, 0.6, *(0.1 + 0.9 * (1 + value) / 2 for value in cosine)]
    assert rates == pytest.approx(expected)
