"""What a training does in which order, its parts replaced by notes."""

from types import SimpleNamespace

import pytest
import torch
from detectron2.engine import hooks as theirs
from detectron2.utils.events import EventWriter
from fvcore.common.param_scheduler import ConstantParamScheduler
from omegaconf import OmegaConf
from torch import nn

from dense.detection import engine
from dense.detection.announcing import Announce
from dense.detection.hooks import (
    EarlyStop,
    KeepBest,
    StopOnSignal,
    StoppedEarly,
    ValidateOnResume,
    WriteMetrics,
)
from dense.detection.resuming import SeedSteps

WRITER = EventWriter()


class Trainer:
    """Takes hooks, and trains at once."""

    def __init__(self, loader, ends):
        self.data_loader, self.hooks, self.iter, self.ends = loader, [], -1, ends

    def register_hooks(self, hooks):
        self.hooks += [hook for hook in hooks if hook is not None]

    def train(self, first, last):
        self.iter = last - 1
        self.ends("train", first, last)


@pytest.fixture
def run(monkeypatch, tmp_path):
    """A function of changes to a training; returns the notes and the trainer."""
    notes = []

    def note(*what):
        notes.append(what)

    def call(
        *, last=None, iteration=-1, main=True, evaluator=True, extra=(), stops=False,
        logged=False, device="cpu", seed=7, **options,
    ):  # fmt: skip
        notes.clear()
        train = dict(output_dir=str(tmp_path), seed=seed, device=device, max_iter=10, log_period=3)
        train |= dict(eval_period=4, checkpointer=dict(period=5, max_to_keep=2))
        train |= dict(ddp=dict(broadcast_buffers=False))
        loaders = dict(train="loader", metadata=dict(classes=["a"]))
        loaders |= dict(evaluator="evaluator") if evaluator else {}
        cfg = dict(
            train=train, dataloader=loaders, optimizer=dict(params={}), lr_multiplier="rates"
        )
        cfg = OmegaConf.create(cfg, flags={"allow_objects": True})
        model = nn.Linear(2, 2)
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)

        def instantiate(node):
            if node == "loader":
                return "batches"
            if node == "rates":
                return ConstantParamScheduler(0.5)
            assert node.params.model is model
            return optimizer

        def ends(*what):
            note(*what)
            if stops:
                raise StoppedEarly("no gain")

        class Checkpointer:
            path_manager = None

            def __init__(self, given, folder, *, classes, seed):
                note("checkpointer", given is model, folder, classes, seed)
                self.seed, self.save_dir, self.has = seed, folder, {}

            def last_whole(self):
                note("last whole")
                return last

            def add_checkpointable(self, name, part):
                self.has[name] = part

            def resume(self, path):
                found.iter = iteration
                note("resume", path, self.has["trainer"] is found)
                return dict(extra)

            def save(self, name, **about):
                note("save", name, about)

            def copy(self, path, name):
                note("copy", path, name)

        found = Trainer("batches", ends)
        parts = {
            "_built": lambda _: model,
            "instantiate": instantiate,
            "WholeCheckpointer": Checkpointer,
            "_start_fresh": lambda c, m, k: note("fresh", c is cfg and m is model),
            "create_ddp_model": lambda m, **k: note("parallel", k) or "parallel",
            "build_trainer": lambda *a: note("trainer", *a[1:]) or found,
            "run_writers": lambda *a: note("writers", *a) or [WRITER],
            "evaluate": lambda *a: note("evaluate", *a[1:]),
            "_same_classes": lambda *a: note("same classes", *a),
            "resumable": lambda *a: note("resumable", *a) or "resumed batches",
            "_validated_at_last": lambda *a: note("validated", *a[1:]) or logged,
        }
        for name, part in parts.items():
            monkeypatch.setattr(engine, name, part)
        monkeypatch.setattr(engine.comm, "is_main_process", lambda: main)
        monkeypatch.setattr(engine.comm, "shared_random_seed", lambda: 99)
        monkeypatch.setattr(engine.journal, "end", lambda folder: note("end", folder))
        ready = lambda: note("ready")  # noqa: E731
        options = dict(resume=False, on_ready=ready, config_file="a.py") | options
        engine.train(cfg, **options)
        return notes, found

    return call


def kinds(trainer) -> list[type]:
    return [type(hook) for hook in trainer.hooks]


def test_a_training_from_its_beginning(run, tmp_path):
    notes, trainer = run()
    folder = str(tmp_path)
    assert notes == [
        ("checkpointer", True, folder, ["a"], 7),
        ("fresh", True),
        ("parallel", {"broadcast_buffers": False, "device_ids": None}),
        ("trainer", "parallel", "batches", notes[3][3]),
        ("writers", folder, 10),
        ("ready",),
        ("resumable", "batches", 7, 0),
        ("train", 0, 10),
        ("end", folder),
    ]
    assert isinstance(notes[3][3], torch.optim.SGD) and trainer.data_loader == "resumed batches"
    assert kinds(trainer) == [
        *(theirs.IterationTimer, theirs.LRScheduler, WriteMetrics, theirs.PeriodicCheckpointer),
        *(theirs.EvalHook, KeepBest, theirs.PeriodicWriter, StopOnSignal),
        *(Announce, SeedSteps, ValidateOnResume),
    ]
    _, rates, metrics, periodic, evaluation, best, writer, stop, announce, seeds, late = (
        trainer.hooks
    )
    assert rates._scheduler(0.3) == 0.5 and metrics._period == writer._period == 3
    assert writer._writers == [WRITER]
    assert (periodic.period, periodic.max_to_keep) == (5, 2)
    assert evaluation._period == best._period == 4 and late._evaluation is evaluation
    assert (late._folder, late._best, seeds.seed) == (folder, best, 7)
    assert stop._checkpointer is best._checkpointer is periodic.checkpointer
    assert (announce._last, announce._config_file) == (None, "a.py")
    evaluation._func()
    assert notes[-1] == ("evaluate", "parallel")


def test_other_processes_and_other_machines(run, tmp_path):
    notes, trainer = run(main=False, device="cuda", seed=0, resume=True)
    assert [name for name, *_ in notes] == [
        *("checkpointer", "last whole", "fresh", "parallel", "trainer", "ready", "resumable"),
        "train",
    ]
    assert notes[0][-1] == 0 and notes[3] == ("parallel", {"broadcast_buffers": False})
    assert kinds(trainer) == [
        *(theirs.IterationTimer, theirs.LRScheduler, theirs.EvalHook, StopOnSignal),
        *(SeedSteps, ValidateOnResume),
    ]
    notes, trainer = run(evaluator=False, seed=-1, on_ready=None)
    assert KeepBest not in kinds(trainer) and theirs.EvalHook in kinds(trainer)
    assert notes[0][-1] == 99 and ("resumable", "batches", 99, 0) in notes
    assert trainer.hooks[-1]._best is None


def test_a_training_that_begins_anew_says_so(run, tmp_path, caplog):
    with caplog.at_level("INFO"):
        run(resume=True)
        assert f"no checkpoint in {tmp_path}: training from scratch" in caplog.text
        caplog.clear()
        run()
        assert "no checkpoint" not in caplog.text


@pytest.mark.parametrize("extra, seed", [({"seed": 3, "classes": ["a"]}, 3), ({}, 7)])
def test_a_training_that_goes_on(run, tmp_path, extra, seed):
    last = str(tmp_path / "model_0000004.pth")
    notes, trainer = run(resume=True, last=last, iteration=4, extra=extra, early_stop=2)
    names = [name for name, *_ in notes]
    assert names == [
        *("checkpointer", "last whole", "parallel", "trainer", "writers", "resume", "same classes"),
        *("ready", "resumable", "train", "end"),
    ]
    assert ("resume", last, True) in notes and ("same classes", extra, ["a"], last) in notes
    assert ("resumable", "batches", seed, 5) in notes and ("train", 5, 10) in notes
    assert kinds(trainer)[-4:] == [Announce, SeedSteps, ValidateOnResume, EarlyStop]
    assert trainer.hooks[-3].seed == seed and trainer.hooks[-4]._last == last
    stop = trainer.hooks[-1]
    assert (stop._patience, stop._period, stop._folder) == (2, 4, str(tmp_path))


def test_a_training_that_no_longer_gains_is_saved(run, tmp_path, caplog):
    with caplog.at_level("INFO"):
        notes, _ = run(early_stop=2, stops=True)
    assert notes[-2:] == [("save", "model_final", {"iteration": 9}), ("end", str(tmp_path))]
    assert "no gain" in caplog.text
    assert ("save", "model_final", {"iteration": 9}) == run(stops=True, main=False)[0][-1]


@pytest.mark.parametrize("main", [True, False])
@pytest.mark.parametrize("logged", [True, False])
@pytest.mark.parametrize("name, iteration", [("model_0000009", 9), ("model_final", 11)])
def test_a_training_that_had_all_iterations(run, tmp_path, caplog, name, iteration, logged, main):
    last = str(tmp_path / f"{name}.pth")
    options = dict(resume=True, last=last, iteration=iteration, logged=logged, main=main)
    with caplog.at_level("INFO"):
        notes, trainer = run(**options)
    assert f"{last} has all iterations (train.max_iter=10)" in caplog.text
    after = notes[notes.index(("ready",)) + 1 :]
    [validated] = [n for n in after if n[0] == "validated"]
    first, validation, best, writers = validated[1:]
    assert first == iteration + 1 and isinstance(validation, ValidateOnResume)
    assert isinstance(best, KeepBest) is main and writers == ([WRITER] if main else [])
    copied = main and name != "model_final"
    assert [n for n in after if n[0] != "validated"] == [
        *([("copy", last, "model_final")] if copied else []),
        *([] if logged else [("evaluate", "parallel")]),
        *([("end", str(tmp_path))] if main else []),
    ]
    assert "train" not in [name for name, *_ in notes]
    # One iteration more is trained.
    assert ("train", 9, 10) in run(resume=True, last=last, iteration=8)[0]


@pytest.mark.parametrize("late", [True, False])
@pytest.mark.parametrize("with_best", [True, False])
def test_the_last_validation_after_a_kill(monkeypatch, late, with_best):
    seen, trainer = [], Trainer(None, None)

    def validate(iteration):
        storage = trainer.storage
        seen.append((iteration, storage.iter, trainer.start_iter, trainer.iter, trainer.max_iter))
        return late

    validation = SimpleNamespace(validate=validate)
    writer = SimpleNamespace(write=lambda: seen.append("written"))
    best = SimpleNamespace(before_train=lambda: seen.append("read")) if with_best else None
    found = engine._validated_at_last(trainer, 10, validation, best, [writer, writer])
    assert found is late and trainer.hooks == [validation]
    assert seen == [
        *(["read"] if with_best else []),
        (10, 10, 10, 9, 10),
        *(["written"] * 2 if late else []),
    ]
