"""One process's loss of NaN stops all of them, at the same iteration, in a line."""

import math
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from dense.finite import stop_if_not_finite
from tests.support import run_forked


def optimizer(lr=0.02):
    return torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=lr)


def test_finite_losses_pass():
    stop_if_not_finite({"loss_a": torch.tensor(1e30), "loss_b": 2.0}, 1, optimizer(), "")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_the_line(value):
    losses = {"loss_a": torch.tensor(value, requires_grad=True), "loss_b": torch.tensor(2.0)}
    with pytest.raises(FloatingPointError) as stopped:
        stop_if_not_finite(losses, 7, optimizer(), "do that")
    text = f"iteration 7: loss_a={value:.4g} is not finite (loss_a={value:.4g}, loss_b=2; "
    assert str(stopped.value) == f"{text}learning rate 0.02); do that"


def test_the_largest_rate_and_every_bad_loss_are_named():
    weights = [torch.zeros(1, requires_grad=True) for _ in range(3)]
    rates = [dict(params=[w], lr=lr) for w, lr in zip(weights, (0.01, 0.123456, 0.02), strict=True)]
    losses = {"a": float("nan"), "b": torch.tensor(1.23456789, dtype=torch.float64), "c": -math.inf}
    with pytest.raises(FloatingPointError) as stopped:
        stop_if_not_finite(losses, 12, torch.optim.SGD(rates), "stop")
    assert str(stopped.value) == (
        "iteration 12: a=nan, c=-inf is not finite (a=nan, b=1.235, c=-inf; learning rate 0.1235); "
        "stop"
    )


@pytest.mark.parametrize("available, initialized", [(False, True), (True, False), (True, True)])
def test_a_process_alone_asks_no_other(monkeypatch, available, initialized):
    monkeypatch.setattr(dist, "is_available", lambda: available)
    monkeypatch.setattr(dist, "is_initialized", lambda: initialized)
    monkeypatch.setattr(dist, "get_world_size", lambda: 1 if initialized and available else 2)
    monkeypatch.setattr(dist, "all_reduce", lambda *_: pytest.fail("it asked"))
    stop_if_not_finite({"loss": 1.0}, 1, optimizer(), "")


def test_another_process_may_have_found_one(monkeypatch):
    asked = []

    def all_reduce(value, operation):
        asked.append((int(value), value.dtype, operation))
        value.fill_(1)

    for name, found in (("is_available", True), ("is_initialized", True), ("get_world_size", 2)):
        monkeypatch.setattr(dist, name, lambda found=found: found)
    monkeypatch.setattr(dist, "all_reduce", all_reduce)
    with pytest.raises(
        FloatingPointError, match="^iteration 3: a loss of another process is not f"
    ):
        stop_if_not_finite({"loss": 1.0}, 3, optimizer(), "")
    assert asked == [(0, torch.int32, dist.ReduceOp.MAX)]


def work(rank: int, meeting: Path) -> None:
    """One of two processes; the second one's third loss is NaN."""
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=2)
    for iteration in range(1, 6):
        value = float("nan") if (rank, iteration) == (1, 3) else 1.0
        stop_if_not_finite({"loss": torch.tensor(value)}, iteration, optimizer(), "")


@pytest.mark.slow
def test_all_processes_stop_together(tmp_path):
    ranks = (partial(work, rank, tmp_path / "meet") for rank in range(2))
    first, second = (done.stderr for done in run_forked(*ranks))
    assert "iteration 3: a loss of another process is not finite (loss=1;" in first
    assert "iteration 3: loss=nan is not finite" in second
