"""The hooks one by one, over a trainer that does nothing: when they act, and what is written."""

import json
from types import SimpleNamespace

import pytest
import torch
from detectron2.engine.hooks import EvalHook
from detectron2.utils.events import EventStorage, JSONWriter, TensorboardXWriter
from torch import nn

from dense.detection import hooks
from dense.detection.hooks import (
    EarlyStop,
    KeepBest,
    StopOnSignal,
    StoppedEarly,
    ValidateOnResume,
    WriteMetrics,
    run_writers,
)
from dense.runs import Stopped


def lines(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.json").read_text().splitlines()]


def log(folder, *found: dict):
    (folder / "metrics.json").write_text("".join(json.dumps(line) + "\n" for line in found))


class Writer(JSONWriter):
    """Counts its writes."""

    def __init__(self):
        self.count = 0

    def write(self):
        self.count += 1

    def close(self):
        pass


def test_metrics_are_written_in_time_for_the_checkpoint():
    writer, other = Writer(), SimpleNamespace()
    hook = WriteMetrics([other, writer], 3)
    found = []
    for iteration in range(7):
        hook.trainer = SimpleNamespace(iter=iteration)
        hook.after_step()
        found.append(writer.count)
    assert found == [0, 0, 1, 1, 1, 2, 2]


def test_an_iteration_is_printed_once(tmp_path, monkeypatch):
    printer, metrics, board = run_writers(str(tmp_path), 9)
    assert isinstance(board, TensorboardXWriter) and isinstance(metrics, JSONWriter)
    printed = []
    monkeypatch.setattr(
        hooks.CommonMetricPrinter,
        "write",
        lambda self: printed.append(hooks.get_event_storage().iter),
    )
    with EventStorage() as storage:
        for iteration in (0, 0, 1, 1, 2):
            storage.iter = iteration
            printer.write()
    assert printed == [0, 1, 2]


def test_what_is_new_of_an_iteration_is_a_line(tmp_path):
    metrics = run_writers(str(tmp_path), 9)[1]
    with EventStorage() as storage:
        storage.put_scalars(total_loss=3.0, lr=0.5, smoothing_hint=False)
        metrics.write()
        metrics.write()
        # The results of an evaluation, after the line of the same iteration.
        storage.put_scalar("bbox/AP", 12.5, smoothing_hint=False)
        metrics.write()
        assert lines(tmp_path) == [
            {"iteration": 0, "lr": 0.5, "total_loss": 3.0},
            {"iteration": 0, "bbox/AP": 12.5},
        ]
        storage.iter = 1
        storage.put_scalar("lr", 0.25, smoothing_hint=False)
        storage.iter = 4
        storage.put_scalar("total_loss", 2.0, smoothing_hint=False)
        metrics.write()
    assert lines(tmp_path)[2:] == [
        {"iteration": 1, "lr": 0.25},
        {"iteration": 4, "total_loss": 2.0},
    ]
    text = (tmp_path / "metrics.json").read_text().splitlines()
    assert text[1] == '{"bbox/AP": 12.5, "iteration": 0}'


class Checkpointer:
    """Notes what is saved."""

    def __init__(self, folder):
        self.save_dir, self.model, self.saved = str(folder), nn.Linear(1, 1), []

    def save(self, name, **about):
        self.saved.append((name, about))

    def has_checkpoint(self):
        return False


@pytest.mark.parametrize("main", [True, False])
@pytest.mark.parametrize("world, own, other, number", [(1, 2, 0, 2), (2, 0, 15, 15), (2, 2, 0, 2)])
def test_a_signal_to_any_process_stops_all(tmp_path, monkeypatch, main, world, own, other, number):
    def all_reduce(value, operation):
        assert operation == torch.distributed.ReduceOp.MAX and value.dtype == torch.int64
        value.fill_(max(int(value), other))

    monkeypatch.setattr(hooks, "Stop", lambda: SimpleNamespace(asked=0))
    monkeypatch.setattr(hooks.comm, "get_world_size", lambda: world)
    monkeypatch.setattr(hooks.comm, "is_main_process", lambda: main)
    monkeypatch.setattr(hooks.dist, "all_reduce", all_reduce)
    checkpointer = Checkpointer(tmp_path)
    hook = StopOnSignal(checkpointer)
    hook.trainer = SimpleNamespace(iter=41)
    hook.before_train()
    if world == 1:
        hook.after_step()
    hook._stop.asked = own
    with pytest.raises(Stopped) as stopped:
        hook.after_step()
    assert stopped.value.number == number
    assert stopped.value.checkpoint == str(tmp_path / "model_0000041.pth")
    assert checkpointer.saved == ([("model_0000041", {"iteration": 41})] if main else [])


def test_processes_agree_where_their_model_is(tmp_path, monkeypatch):
    """NCCL reduces what is on a GPU."""
    devices = []
    monkeypatch.setattr(hooks, "Stop", lambda: SimpleNamespace(asked=0))
    monkeypatch.setattr(hooks.comm, "get_world_size", lambda: 2)
    monkeypatch.setattr(
        hooks.dist, "all_reduce", lambda value, _: devices.append(value.device.type)
    )
    hook = StopOnSignal(Checkpointer(tmp_path))
    hook._checkpointer.model.to("meta")
    hook.before_train()
    with pytest.raises(RuntimeError, match="meta"):
        hook.after_step()
    assert devices == ["meta"]


@pytest.mark.parametrize(
    "first, there, best",
    [
        (5, True, (20.0, 4)),
        (4, True, (20.0, 3)),
        (3, True, (10.0, 2)),
        (5, False, None),
        (0, True, None),
    ],
)
def test_the_best_of_the_evaluations_before(tmp_path, monkeypatch, first, there, best):
    log(tmp_path, *({"iteration": n, "bbox/AP": v} for n, v in ((1, 10.0), (2, 5.0), (3, 20.0))))
    log_of_later = {"iteration": 6, "bbox/AP": 99.0}
    with open(tmp_path / "metrics.json", "a") as file:
        file.write(json.dumps(log_of_later) + "\n")
    if there:
        (tmp_path / "model_best.pth").touch()
    checkpointer = Checkpointer(tmp_path)
    hook = KeepBest(2, checkpointer)
    hook.trainer = SimpleNamespace(start_iter=first)
    hook.before_train()
    assert (hook.best_metric and (hook.best_metric, hook.best_iter)) == best
    # As high is not higher.
    for value, saved in ((20.0, best is None or best[0] < 20), (21.0, True), (21.0, False)):
        checkpointer.saved.clear()
        with EventStorage(7) as storage:
            storage.put_scalar("bbox/AP", value, smoothing_hint=False)
            hook.trainer = SimpleNamespace(iter=7, storage=storage, max_iter=99)
            hook.after_step()
        assert checkpointer.saved == ([("model_best", {"iteration": 7})] if saved else [])
    checkpointer.saved.clear()
    with EventStorage(8) as storage:
        storage.put_scalar("bbox/AP", 50.0, smoothing_hint=False)
        hook.trainer = SimpleNamespace(iter=8, storage=storage, max_iter=99)
        hook.after_step()
    assert checkpointer.saved == [], "between two evaluations"


def trainer(iteration, start=0, last=99, **values):
    latest = {name.replace("_", "/"): (value, iteration) for name, value in values.items()}
    storage = SimpleNamespace(latest=lambda: latest)
    return SimpleNamespace(iter=iteration, start_iter=start, max_iter=last, storage=storage)


def test_a_training_ends_when_it_no_longer_gains(tmp_path):
    hook = EarlyStop(2, 2, str(tmp_path))
    hook.trainer = trainer(0)
    hook.before_train()
    # Every second iteration has an evaluation; the one at the end is none of these.
    for iteration, value, last in (
        (1, 10.0, 99),
        (2, 5.0, 99),
        (3, 9.0, 99),
        (4, 1.0, 99),
        (5, 1.0, 6),
    ):
        hook.trainer = trainer(iteration, last=last, bbox_AP=value)
        hook.after_step()
    hook.trainer = trainer(5)
    hook.after_step()
    hook.trainer = trainer(7, bbox_AP=10.0)
    with pytest.raises(StoppedEarly) as stopped:
        hook.after_step()
    assert str(stopped.value) == (
        "bbox/AP has not risen in 2 evaluations: the training ends after iteration 7"
    )
    assert hook.trainer.iter == 7


@pytest.mark.parametrize("late, ends", [(None, False), (15.0, True), (25.0, False)])
def test_a_resumed_training_counts_those_before(tmp_path, late, ends):
    """And one that a kill cut off, which is not in the file yet."""
    log(tmp_path, *({"iteration": n, "bbox/AP": v} for n, v in ((1, 20.0), (3, 10.0), (5, 99.0))))
    hook = EarlyStop(2, 2, str(tmp_path))
    hook.trainer = trainer(4, start=4, **({"bbox_AP": late} if late else {}))
    if ends:
        with pytest.raises(StoppedEarly, match="risen in 2 evaluations: .* ends after iteration 3"):
            hook.before_train()
        # What a checkpoint counts.
        assert hook.trainer.iter == 3
    else:
        hook.before_train()
        assert hook._values == [20.0, 10.0, *([late] if late else [])] and hook.trainer.iter == 4


def test_the_main_process_decides_for_all(tmp_path, monkeypatch):
    hook = EarlyStop(2, 1, str(tmp_path))
    hook.trainer = trainer(0)
    monkeypatch.setattr(hooks.comm, "all_gather", lambda own: [5, own])
    with pytest.raises(StoppedEarly, match="risen in 5 evaluations"):
        hook.after_step()


@pytest.mark.parametrize(
    "first, period, due",
    [
        (4, 2, True),
        (2, 2, True),
        (1, 1, True),
        (3, 2, False),
        (0, 2, False),
        (4, 0, False),
        (4, 4, True),
    ],
)
@pytest.mark.parametrize(
    "logged, with_best",
    [
        ({}, True),
        ({"iteration": 9, "segm/AP": 1.0}, False),
        ({"segm/AP": 1.0}, True),
        ({"lr": 1.0}, True),
    ],
)
def test_an_evaluation_that_was_cut_off_is_done(tmp_path, first, period, due, logged, with_best):
    seen = []
    evaluation = EvalHook(period, lambda: None)
    evaluation._do_eval = lambda: seen.append(("evaluated", storage.iter))
    best = SimpleNamespace(_best_checking=lambda: seen.append(("compared", storage.iter)))
    storage = SimpleNamespace(iter=first)
    log(tmp_path, {"iteration": first - 1, **logged})
    hook = ValidateOnResume(evaluation, str(tmp_path), best if with_best else None)
    hook.trainer = SimpleNamespace(start_iter=first, storage=storage)
    there = logged == {"segm/AP": 1.0}
    hook.before_train()
    expected = [("evaluated", first - 1), *([("compared", first - 1)] if with_best else [])]
    assert seen == (expected if due and not there else []) and storage.iter == first
    seen.clear()
    assert hook.validate(first - 1) is not there
    assert seen == ([] if there else expected) and storage.iter == first
    (tmp_path / "metrics.json").unlink()
    assert hook.validate(7) is True and seen[-1][1] == 7
