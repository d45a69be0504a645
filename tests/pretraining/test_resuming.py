"""A run that was stopped and resumed is the run that was not, bit for bit."""

import json
from pathlib import Path

import pytest
import torch
from mmengine.hooks import CheckpointHook, LoggerHook
from mmengine.runner import get_priority
from timm.scheduler import CosineLRScheduler

from dense.openmmlab import hooks
from dense.openmmlab.resuming import ResumableSampler, SeedEveryIteration
from dense.pretraining.hooks import ProgressBar
from dense.seeding import Place, SeededDataset
from tests.support import assert_same, losses

pytestmark = pytest.mark.slow

SAVE = ["default_hooks.checkpoint.by_epoch=False", "default_hooks.checkpoint.interval=1"]
SAVE += ["default_hooks.checkpoint.max_keep_ckpts=-1", "default_hooks.checkpoint.save_best=None"]
SAVE += ["default_hooks.logger.interval=1", "randomness.seed=3"]
# ImageNet-1K's recipe, on a network and images of a size for tests.
RECIPE = "dw_conv_tiny_8xb128-300e_in1k-224x224"
SMALL = ["model.name=dw_conv_nano", "param_scheduler.0.warmup=1"]
SMALL += [f"{loader}_dataloader.dataset.transform.input_size=32" for loader in ("train", "val")]
OUR_HOOKS = (SeedEveryIteration, ProgressBar, hooks.StopOnNonFiniteLoss, hooks.StopOnSignal)
OUR_HOOKS += (hooks.ValidateOnResume, hooks.AveragedWeights)


def rates(work_dir: Path) -> dict[int, float]:
    """The learning rates in a work folder's logs, by step."""
    return {
        entry["step"]: entry["lr"]
        for log in sorted(work_dir.glob("*/vis_data/scalars.json"))
        for entry in map(json.loads, log.read_text().splitlines())
        if "lr" in entry
    }


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("stop", [2, 3])
def test_pretraining(run, tmp_path, workers, stop):
    """Two epochs of three iterations, stopped in the middle of the first or at its end; dropout,
    mixing, averaged weights and augmentation all draw, and the learning rate has its schedule."""
    options = [*SAVE, *SMALL, "model.drop_rate=0.2", f"train_dataloader.num_workers={workers}"]

    def train(*args, work_dir):
        return run("--ema", "0.9", *args, config=RECIPE, options=options, work_dir=work_dir)

    whole, parts = train(work_dir=tmp_path / "whole"), tmp_path / "parts"
    # Stopped: the schedule is that of the whole run, and what came after is gone.
    train(work_dir=parts)
    for path in parts.glob("*.pth"):
        if int(path.stem.split("_")[-1]) > stop:
            path.unlink()
    for log in parts.glob("*/vis_data/scalars.json"):
        log.write_text("")
    train("--resume", work_dir=parts)

    expected, found = losses(whole), losses(parts)
    assert set(found) == set(range(stop + 1, 7))
    assert all(found[step] == expected[step] for step in found)
    one, two = (torch.load(w / "iter_6.pth", weights_only=False) for w in (whole, parts))
    for key in ("state_dict", "ema_state_dict", "optimizer", "param_schedulers"):
        assert_same(one[key], two[key], key)

    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1e-3)
    settings = dict(t_initial=6, warmup_t=3, warmup_lr_init=1e-6, lr_min=1e-5, t_in_epochs=False)
    timms = CosineLRScheduler(optimizer, **settings)
    for step, rate in sorted(rates(whole).items()):
        timms.step_update(step - 1)
        assert rate == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-9)
    assert rates(whole).items() >= rates(parts).items() and len(rates(whole)) == 6


def test_every_process_takes_its_turn_from_any_place(monkeypatch):
    data = list(range(10))
    whole = list(map(int, ResumableSampler(data, seed=5)))
    assert sorted(whole) == data and whole != data
    shares = []
    for rank in range(3):
        monkeypatch.setattr("dense.openmmlab.resuming.get_dist_info", lambda r=rank: (r, 3))
        sampler = ResumableSampler(data, seed=5)
        share = list(sampler)
        assert len(share) == len(sampler) == 4
        sampler.start = 2
        assert [(int(p), p.seed) for p in sampler] == [(int(p), p.seed) for p in share[2:]]
        assert len(list(sampler)) == 4  # only once
        shares.append(share)
    turns = [int(share[step]) for step in range(4) for share in shares]
    assert turns[:10] == whole and turns[10:] == whole[:2]
    assert len({place.seed for share in shares for place in share}) == 12

    monkeypatch.setattr("dense.openmmlab.resuming.get_dist_info", lambda: (1, 2))
    endless = ResumableSampler(data, seed=5, infinite=True)
    head = [place for place, _ in zip(endless, range(40), strict=False)]
    assert sorted(map(int, head[:5] + head[5:10])) != data  # two passes, every second index
    endless.start = 17
    tail = [place for place, _ in zip(endless, range(23), strict=False)]
    assert [(int(p), p.seed) for p in tail] == [(int(p), p.seed) for p in head[17:]]


def test_hooks_run_where_their_work_belongs():
    """MMEngine's numbers: those of a lower one run first."""
    number = {hook: get_priority(hook.priority) for hook in OUR_HOOKS}
    saved, logged = get_priority(CheckpointHook.priority), get_priority(LoggerHook.priority)
    # Nothing draws before the seed; damaged weights are never written, averaged ones are.
    assert number[hooks.StopOnNonFiniteLoss] < saved and number[hooks.AveragedWeights] < saved
    assert number[SeedEveryIteration] == min(number.values()) < get_priority("NORMAL")
    assert number[ProgressBar] <= logged < saved
    # What stops a run leaves its checkpoint, and a validation may be the best one's.
    assert saved < min(number[hooks.StopOnSignal], number[hooks.ValidateOnResume])


def test_a_sample_depends_on_its_place_alone():
    class Noise(torch.utils.data.Dataset):
        metainfo = {"classes": ["a"]}

        def __len__(self):
            return 4

        def __getitem__(self, index):
            return index, torch.rand(())

    dataset = SeededDataset(Noise())
    assert dataset.metainfo == {"classes": ["a"]}
    torch.manual_seed(0)
    before = torch.get_rng_state()
    first = dataset[Place(2, 99)]
    assert torch.get_rng_state().equal(before)
    torch.rand(7)
    assert dataset[Place(2, 99)] == first and dataset[Place(2, 98)] != first
