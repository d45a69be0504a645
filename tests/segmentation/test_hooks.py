"""What the hooks do at the borders, on a runner that has only what they read."""

import json
import logging
from types import SimpleNamespace

import pytest
import torch
from mmengine.runner import EpochBasedTrainLoop, IterBasedTrainLoop

from dense.openmmlab import hooks, logs
from dense.runs import Stopped


@pytest.fixture
def runner(tmp_path):
    """After 6 iterations and 2 epochs; ``done`` is what it was asked for, in order."""
    done = []
    return SimpleNamespace(
        **dict(iter=6, epoch=2, rank=0, distributed=False, work_dir=str(tmp_path), done=done),
        logger=SimpleNamespace(info=done.append),
        val_loop=SimpleNamespace(run=lambda: done.append("validated")),
        train_loop=SimpleNamespace(stop_training=False),
        save_checkpoint=lambda folder, name, **options: done.append((folder, name, options)),
        optim_wrapper=SimpleNamespace(
            optimizer=torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.5)
        ),
    )


# Losses that are not finite


@pytest.mark.parametrize("outputs", [None, {}, {"acc": float("nan")}, {"loss": 1.0}])
def test_accuracies_and_finite_losses_pass(runner, outputs):
    hooks.StopOnNonFiniteLoss().after_train_iter(runner, 0, outputs=outputs)


def test_any_loss_stops(runner):
    outputs = {"acc": float("nan"), "aux.loss_ce": float("inf"), "loss": 2.0}
    with pytest.raises(FloatingPointError) as error:
        hooks.StopOnNonFiniteLoss().after_train_iter(runner, 0, outputs=outputs)
    assert str(error.value) == (
        "iteration 7: aux.loss_ce=inf is not finite (aux.loss_ce=inf, loss=2; learning rate 0.5); "
        "a lower learning rate, or AMP in bfloat16 (optim_wrapper.dtype=bfloat16), may help"
    )


# Signals


@pytest.fixture
def signalled(monkeypatch):
    """What the hook listens to; ``asked`` is the signal."""
    stop = SimpleNamespace(asked=0)
    monkeypatch.setattr(hooks, "Stop", lambda: stop)
    return stop


@pytest.mark.parametrize(("here", "elsewhere"), [(0, 0), (15, 0), (0, 2), (2, 15)])
@pytest.mark.parametrize("distributed", [False, True])
def test_a_signal_to_any_process_stops_at_the_end_of_an_iteration(
    runner, signalled, monkeypatch, here, elsewhere, distributed
):
    def all_reduce(value, kind):
        assert kind == "max" and value.shape == ()
        value.fill_(max(int(value), elsewhere))

    monkeypatch.setattr(hooks, "all_reduce", all_reduce)
    runner.distributed, signalled.asked = distributed, here
    hook = hooks.StopOnSignal()
    hook.before_train(runner)
    heard = max(here, elsewhere if distributed else 0)
    if not heard:
        hook.after_train_iter(runner, 0)
        assert runner.done == []
        return
    with pytest.raises(Stopped) as stopped:
        hook.after_train_iter(runner, 0)
    assert stopped.value.args == (heard, f"{runner.work_dir}/iter_7.pth")
    assert isinstance(stopped.value.number, int)
    options = dict(meta=dict(epoch=2, iter=7), by_epoch=False)
    assert runner.done == [(runner.work_dir, "iter_7.pth", options)]


@pytest.mark.parametrize(
    ("asked", "saved", "distributed", "stops"),
    [
        *((15, 6, False, True), (15, 6, True, False), (15, 5, False, False), (0, 6, False, False)),
        (15, None, False, False),
    ],
)
def test_a_validation_stops_if_nothing_is_lost(runner, signalled, asked, saved, distributed, stops):
    hook = hooks.StopOnSignal()
    hook.after_val_iter(runner, 0)  # before a training, and in a test
    hook.before_train(runner)
    if saved is not None:
        hook.before_save_checkpoint(runner, {"meta": {"iter": saved}})
    signalled.asked, runner.distributed = asked, distributed
    if not stops:
        hook.after_val_iter(runner, 0)
        return
    with pytest.raises(Stopped) as stopped:
        hook.after_val_iter(runner, 0)
    assert stopped.value.args == (15, "the checkpoint of iteration 6")


def test_a_new_training_has_no_checkpoint_of_its_start(runner, signalled):
    hook = hooks.StopOnSignal()
    hook.before_train(runner)
    signalled.asked = 15
    for runner.iter in (0, 1):
        hook.after_val_iter(runner, 0)


# A validation that was cut off


def loop(kind, done, **attributes):
    """A loop of MMEngine's that was not built: 3 iterations an epoch."""
    made = kind.__new__(kind)
    made.__dict__ |= dict(_iter=done, _epoch=done // 3, dataloader=range(3), val_begin=1)
    made.__dict__ |= dict(dynamic_milestones=[0], dynamic_intervals=[2], val_interval=99)
    made.__dict__ |= dict(_max_epochs=5, _max_iters=15 if kind is EpochBasedTrainLoop else 5)
    made.__dict__ |= attributes
    return made


def write_log(runner, *entries):
    path = f"{runner.work_dir}/20261128_120000/vis_data/scalars.json"
    hooks.Path(path).parent.mkdir(parents=True, exist_ok=True)
    hooks.Path(path).write_text("".join(json.dumps(entry) + "\n" for entry in entries))


@pytest.mark.parametrize(
    ("done", "attributes", "due"),
    [
        *(
            (0, {}, False),
            (0, {"val_begin": 0}, False),
            (2, {}, True),
            (3, {}, False),
            (4, {}, True),
        ),
        # The last one is due whatever the interval.
        *((5, {}, True), (3, {"dynamic_intervals": [3]}, True), (2, {"val_begin": 3}, False)),
        *(
            (2, {"val_begin": 2}, True),
            (4, {"dynamic_milestones": [0, 4], "dynamic_intervals": [3, 2]}, True),
        ),
        (4, {"dynamic_milestones": [0, 4], "dynamic_intervals": [2, 3]}, False),
    ],
)
@pytest.mark.parametrize("by_epoch", [False, True])
def test_a_validation_is_due_where_the_loop_would_run_it(runner, done, attributes, due, by_epoch):
    kind, each = (EpochBasedTrainLoop, 3) if by_epoch else (IterBasedTrainLoop, 1)
    runner.train_loop = loop(kind, done * each, **attributes)
    # MMEngine finds the interval by the epoch that comes next.
    hook = hooks.ValidateOnResume()
    runner.iter = done * each
    hook.before_train(runner)
    said = f"the validation after iteration {done * each} was cut off: again"
    assert runner.done == ([said, "validated"] if due else [])


def test_within_an_epoch_no_validation_is_due(runner):
    for done in (5, 7):
        runner.train_loop = loop(EpochBasedTrainLoop, done, dynamic_intervals=[1])
        hooks.ValidateOnResume().before_train(runner)
    assert runner.done == []


@pytest.mark.parametrize("by_epoch", [False, True])
def test_a_validation_that_the_log_has_is_not_repeated(runner, by_epoch):
    kind, each = (EpochBasedTrainLoop, 3) if by_epoch else (IterBasedTrainLoop, 1)
    runner.train_loop = loop(kind, 4 * each)
    training = {"loss": 1.0, "step": 4 * each} | ({"epoch": 4} if by_epoch else {})
    before = {"mIoU": 50.0, "step": 2}
    write_log(runner, {**training, "step": 2 * each}, before, training)
    hooks.ValidateOnResume().before_train(runner)
    assert runner.done[1:] == ["validated"]
    write_log(runner, training, before, training, {"mIoU": 50.0, "step": 4})
    hooks.ValidateOnResume().before_train(runner)
    assert len(runner.done) == 2


@pytest.mark.parametrize("change", [dict(rank=1), dict(val_loop=None)])
def test_other_processes_and_trainings_without_validation_look_for_none(runner, change):
    runner.train_loop = loop(IterBasedTrainLoop, 4)
    vars(runner).update(change)
    hooks.ValidateOnResume().before_train(runner)
    assert runner.done == []


def test_what_the_first_process_finds_due_all_run(runner, monkeypatch):
    def broadcast(found):
        found[0] = True

    monkeypatch.setattr(hooks, "broadcast_object_list", broadcast)
    runner.rank = 1
    hooks.ValidateOnResume().before_train(runner)
    assert runner.done[1:] == ["validated"]


# Early stop


def test_a_training_stops_after_evaluations_without_gain(runner):
    hook = hooks.EarlyStop("mIoU", 2)
    hook.before_train(SimpleNamespace(**vars(runner) | dict(iter=0)))
    for value in (10.0, 30.12345, 20.0):
        hook.after_val_epoch(runner, {"mIoU": value, "aAcc": 99.0})
    assert not runner.train_loop.stop_training and runner.done == []
    hook.after_val_epoch(runner, {"mIoU": 30.0})
    assert runner.train_loop.stop_training
    assert runner.done == [
        "mIoU has not risen above 30.12 in 2 evaluations: the training ends at iteration 6",
        (runner.work_dir, "iter_6.pth", dict(meta=dict(epoch=2, iter=6), by_epoch=False)),
    ]


@pytest.mark.parametrize("name", ["iter_6.pth", "epoch_2.pth"])
def test_a_checkpoint_that_is_there_is_not_written_again(runner, name):
    hooks.Path(runner.work_dir, name).touch()
    hook = hooks.EarlyStop("mIoU", 1)
    for value in (10.0, 5.0):
        hook.after_val_epoch(runner, {"mIoU": value})
    assert len(runner.done) == 1 and runner.train_loop.stop_training


def test_evaluations_before_a_resumption_count(runner):
    write_log(runner, {"loss": 1.0, "step": 1})
    write_log(
        runner,
        *({"loss": 1.0, "step": step} for step in (1, 2)),
        *({"mIoU": value, "step": step} for step, value in ((2, 30.0), (4, 20.0), (6, 10.0))),
        {"mIoU": 90.0, "step": 8},
    )
    hook = hooks.EarlyStop("mIoU", 3)
    hook.before_train(runner)
    assert not runner.train_loop.stop_training
    hook = hooks.EarlyStop("mIoU", 2)
    hook.before_train(SimpleNamespace(**vars(runner) | dict(iter=0)))
    assert not runner.train_loop.stop_training
    hook.before_train(runner)
    assert runner.train_loop.stop_training
    # It ends before it begins: the checkpoint is there.
    assert [said for said in runner.done if not isinstance(said, str)] == []


def test_all_processes_count_what_the_first_has_read(runner, monkeypatch):
    def broadcast(found):
        assert found == [[]]
        found[0] = [30.0, 20.0, 10.0]

    monkeypatch.setattr(hooks, "broadcast_object_list", broadcast)
    hooks.EarlyStop("mIoU", 2).before_train(runner)
    assert runner.train_loop.stop_training


@pytest.mark.parametrize("metrics", [None, {"aAcc": 1.0}])
def test_an_evaluation_without_the_metric_is_named(runner, metrics):
    with pytest.raises(KeyError, match=f"EarlyStop: the evaluation has no 'mIoU': {metrics}"):
        hooks.EarlyStop("mIoU", 2).after_val_epoch(runner, metrics)


# Logs


def test_records_go_to_the_run_once_at_their_level(monkeypatch):
    loggers = {name: logging.Logger(name) for name in ("backbones", "dense")}
    loggers["backbones"].setLevel(logging.NOTSET)
    loggers["dense"].setLevel(logging.ERROR)
    found = SimpleNamespace(**{name: getattr(logging, name) for name in ("NOTSET", "INFO")})
    found.getLogger = loggers.__getitem__
    said = []
    monkeypatch.setattr(logs, "logging", found)
    monkeypatch.setattr(logs, "print_log", lambda text, **options: said.append((text, options)))
    for _ in range(2):
        logs.forward_logs()
    loggers["backbones"].debug("too much")
    loggers["backbones"].info("%s loaded", "all")
    loggers["backbones"].warning("odd")
    loggers["dense"].warning("not asked for")
    loggers["dense"].error("wrong")
    assert said == [
        ("all loaded", dict(logger="current", level=logging.INFO)),
        ("odd", dict(logger="current", level=logging.WARNING)),
        ("wrong", dict(logger="current", level=logging.ERROR)),
    ]
