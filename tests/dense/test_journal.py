"""The first line of a training, and what shows how long it will take."""

import logging
import os
import platform
import sys
from dataclasses import replace
from datetime import datetime, timedelta
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.utils.data import BatchSampler, DataLoader, IterableDataset

from dense import journal

LOADER = DataLoader(list(range(100)), batch_size=8)


class Endless(IterableDataset):
    """Without a length."""

    def __iter__(self):
        return iter([])


def test_devices_have_their_names(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    assert journal.device_name("cpu") == "CPU, 1 thread"
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    assert journal.device_name("cpu", 2) == "2 x CPU, 4 threads"
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "A GPU")
    assert journal.device_name("cuda", 8) == "8 x A GPU"


def test_the_line():
    start = journal.Start("CPU, 2 threads", "float32", 16, 800, 100, "random weights")
    assert str(start) == (
        "training on CPU, 2 threads in float32: 100 steps of 16 of 800 images (2 epochs), "
        "random weights"
    )
    start = replace(start, images=None)
    assert (
        str(start)
        == "training on CPU, 2 threads in float32: 100 steps of 16 images, random weights"
    )
    start = replace(start, images=0, steps=3, batch=7)
    assert "3 steps of 7 of 0 images (21 epochs)" in str(start)
    assert "3 steps of 7 of 16 images (1.31 epochs)" in str(replace(start, images=16))


def test_the_initial_weights_say_what_they_gave():
    def network(source, *counts):
        names = [[f"{n}" for n in range(count)] for count in counts]
        part = nn.Identity()
        keys = ("matched", "missing", "resized")
        part.load_report = SimpleNamespace(source=source, **dict(zip(keys, names, strict=True)))
        return part

    one, two = network("a.pth", 3, 4, 0), network("b.pth", 9, 0, 2)
    empty = nn.Identity()
    empty.load_report = None
    assert journal.weights(nn.Sequential(nn.Identity(), empty)) == "random weights"
    assert journal.weights(nn.Sequential(one, empty, nn.Sequential(two))) == (
        "weights of a.pth: 3 of 7 entries; weights of b.pth: 9 of 9 entries, 2 resized"
    )


def test_a_training_is_entered_and_ended(tmp_path, monkeypatch, caplog):
    start = journal.Start("CPU, 2 threads", "float32", 16, 800, 100, "random weights")
    times = iter((100.0, 200.0, 207.26))
    monkeypatch.setattr(journal, "time", SimpleNamespace(monotonic=lambda: next(times)))
    monkeypatch.setattr(journal, "peak_memory", lambda: 512.6)
    monkeypatch.setattr(sys, "argv", ["tools/train.py", "my config.py"])
    monkeypatch.setattr(journal, "versions", lambda: {"torch": "2.9"})
    monkeypatch.chdir(tmp_path)
    journal.end(tmp_path)
    assert journal.read(tmp_path) == [] and not (tmp_path / journal.FILE).exists()
    journal.begin(tmp_path, start, None)
    journal.begin(tmp_path, start, "my config.py")
    journal.end(tmp_path)
    first, second = journal.read(tmp_path)
    began = datetime.fromisoformat(second.pop("began"))
    assert abs(datetime.now() - began) < timedelta(minutes=10) and began.microsecond == 0
    assert second == {
        "command": "python tools/train.py 'my config.py'",
        "config": str(tmp_path / "my config.py"),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "versions": {"python": platform.python_version(), "torch": "2.9"},
        **{"device": "CPU, 2 threads", "precision": "float32", "batch": 16, "images": 800},
        **{"steps": 100, "weights": "random weights", "seconds": 7.3, "peak_memory_mb": 513},
    }
    assert first["config"] is None and "seconds" not in first
    text = (tmp_path / journal.FILE).read_text()
    assert text.startswith('[\n {\n  "command": "python tools/train.py'), "in lines"
    # What is no list of entries is none; a folder that is gone ends no training.
    (tmp_path / journal.FILE).write_text("{}")
    assert journal.read(tmp_path) == []
    (tmp_path / journal.FILE).write_text("[{")
    assert journal.read(tmp_path) == [] == journal.read(tmp_path / "gone")
    monkeypatch.setattr(journal, "time", SimpleNamespace(monotonic=lambda: 0.0))
    journal.begin(tmp_path / "gone", start, None)
    assert "run.json is not written: " in caplog.text
    # Of a training of another process nothing is known.
    monkeypatch.setattr(journal, "_BEGAN", {})
    journal.begin(tmp_path, start, None)
    journal._BEGAN.clear()
    journal.end(tmp_path)
    assert "seconds" not in journal.read(tmp_path)[0]


def test_the_peak_of_memory_is_in_mb(monkeypatch):
    peak = SimpleNamespace(ru_maxrss=3 * 2**20)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(
        journal.resource, "getrusage", lambda who: {journal.resource.RUSAGE_SELF: peak}[who]
    )
    for platform_, expected in (("linux", 3 * 2**10), ("darwin", 3)):
        monkeypatch.setattr(journal.sys, "platform", platform_)
        assert journal.peak_memory() == expected
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 5 * 2**20)
    assert journal.peak_memory() == 5


def test_what_mmengines_runner_starts_with(monkeypatch):
    announcing = pytest.importorskip("dense.openmmlab.announcing")

    class Amp:
        cast_dtype, _accumulative_counts = torch.bfloat16, 4

    monkeypatch.setattr(announcing, "AmpOptimWrapper", Amp)
    monkeypatch.setattr(announcing, "get_world_size", lambda: 2)
    runner = SimpleNamespace(
        **dict(optim_wrapper=Amp(), train_dataloader=LOADER, model=nn.Linear(1, 1)),
        **dict(iter=0, max_iters=120, _load_from=None),
    )
    start = announcing.started(runner)
    # Of 2 processes, and 4 batches a step.
    assert (start.precision, start.batch, start.images, start.steps) == ("bfloat16", 64, 100, 30)
    assert start.device.startswith("2 x CPU") and start.weights == "random weights"
    Amp.cast_dtype = None
    assert announcing.started(runner).precision == "float16", "autocast's default"
    runner.optim_wrapper, runner._load_from = SimpleNamespace(), "net.pth"
    start = announcing.started(runner)
    assert (start.precision, start.batch, start.steps) == ("float32", 16, 120)
    assert start.weights == "weights of net.pth"
    runner.iter = 60
    assert announcing.started(runner).weights == "resumed after 60 of 120 iterations"


@pytest.mark.parametrize(
    ("loader", "batch", "images"),
    [
        (LOADER, 8, 100),
        (DataLoader([1, 2, 3], batch_size=None), 1, 3),
        (DataLoader([1, 2, 3], batch_sampler=[[0, 1], [2]]), 1, 3),
        (DataLoader([1, 2, 3], batch_sampler=BatchSampler([0, 1, 2], 2, False)), 2, 3),
        (DataLoader(Endless(), batch_size=5), 5, None),
    ],
)
def test_batches_of_every_kind_of_loader(loader, batch, images):
    announcing = pytest.importorskip("dense.openmmlab.announcing")
    runner = SimpleNamespace(
        **dict(optim_wrapper=SimpleNamespace(), train_dataloader=loader, model=nn.Linear(1, 1)),
        **dict(iter=0, max_iters=7, _load_from=None),
    )
    start = announcing.started(runner)
    assert (start.batch, start.images, start.steps) == (batch, images, 7)


def test_what_a_training_is_is_said_and_written(tmp_path, monkeypatch):
    announcing = pytest.importorskip("dense.openmmlab.announcing")
    start = journal.Start("CPU, 2 threads", "float32", 16, 800, 100, "random weights")
    monkeypatch.setattr(announcing, "started", lambda runner: start)
    said = []
    runner = SimpleNamespace(work_dir=str(tmp_path), cfg=SimpleNamespace(filename="/net.py"))
    runner.logger = SimpleNamespace(info=said.append)
    hook = announcing.Announce()
    hook.before_train(runner)
    assert said == [str(start)]
    [entry] = journal.read(tmp_path)
    assert (entry["config"], entry["batch"], entry.get("seconds")) == ("/net.py", 16, None)
    hook.after_train(runner)
    [entry] = journal.read(tmp_path)
    assert entry["seconds"] >= 0


def test_what_detectron2s_trainer_starts_with(tmp_path, monkeypatch):
    announcing = pytest.importorskip("dense.detection.announcing")
    from omegaconf import OmegaConf

    monkeypatch.setattr(announcing.comm, "get_world_size", lambda: 2)
    train = dict(amp=dict(enabled=True, precision="bfloat16"), device="cpu", max_iter=30)
    train |= dict(init_checkpoint="net.pth", output_dir=str(tmp_path))
    cfg = OmegaConf.create(dict(train=train, dataloader=dict(train=dict(total_batch_size=16))))

    def started(last=None):
        hook = announcing.Announce(cfg, last, "config.py")
        hook.trainer = SimpleNamespace(data_loader=LOADER, start_iter=5, model=nn.Linear(1, 1))
        hook.before_train()
        entry = journal.read(tmp_path)[-1]
        return [entry[key] for key in ("precision", "batch", "images", "steps", "weights")]

    assert started() == ["bfloat16", 16, 100, 30, "weights of net.pth"]
    cfg.train.amp.enabled, cfg.train.init_checkpoint = False, ""
    assert started() == ["float32", 16, 100, 30, "random weights"]
    assert started("model.pth")[-1] == "resumed from model.pth at iteration 5"
    assert journal.read(tmp_path)[-1]["device"].startswith("2 x CPU")
    began = journal._BEGAN[str(tmp_path)]
    monkeypatch.setattr(journal, "time", SimpleNamespace(monotonic=lambda: began + 7.26))
    journal.end(tmp_path)
    assert [entry.get("seconds") for entry in journal.read(tmp_path)] == [None, None, 7.3]


def test_detectron2s_lines_have_the_time_that_remains(tmp_path, caplog):
    hooks = pytest.importorskip("dense.detection.hooks")
    from detectron2.utils.events import EventStorage

    with EventStorage(start_iter=5) as storage:
        storage.put_scalars(time=2.0, total_loss=1.0, smoothing_hint=False)
        with caplog.at_level(logging.INFO, logger="detectron2.utils.events"):
            hooks.run_writers(str(tmp_path), 105)[0].write()
    assert "eta: 0:03:18" in caplog.text, "99 iterations of 2 s"


def test_the_bar_of_a_pretraining_is_of_all_iterations(monkeypatch, capsys):
    hooks = pytest.importorskip("dense.pretraining.hooks")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    bar = hooks.ProgressBar()
    bar.before_train(
        SimpleNamespace(
            **dict(world_size=1, train_dataloader=LOADER, max_iters=120, iter=60),
            experiment_name="mine",
        )
    )
    assert (bar._bar.total, bar._bar.initial, bar._images) == (120, 60, 8)
    scalars = {}
    hub = SimpleNamespace(update_scalar=scalars.__setitem__)
    bar.after_train_iter(SimpleNamespace(message_hub=hub), 60, outputs={"loss": 1.5})
    bar._bar.refresh()
    bar.after_train(None)
    shown = capsys.readouterr().err
    assert "mine:  50%" in shown and "loss 1.500" in shown
    assert scalars["train/images_per_second"] > 0
