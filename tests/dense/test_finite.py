"""One process's loss of NaN stops all of them, at the same iteration, in a line."""

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
