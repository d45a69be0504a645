"""The best checkpoint, early stopping, resuming at another length, the services that log."""

import sys
from pathlib import Path
from unittest.mock import MagicMock

import pytest
import torch
from mmseg.evaluation import IoUMetric

from dense.openmmlab.config import use_early_stop
from dense.recipes import RECIPES
from dense.segmentation.config import build_runner
from tests.support import losses

pytestmark = pytest.mark.slow

CONFIGS = RECIPES / "segmentation"


@pytest.fixture
def scripted(monkeypatch):
    """A function: the mIoU of the evaluations to come, one after another."""

    def script(*values):
        left = iter(values)
        monkeypatch.setattr(IoUMetric, "compute_metrics", lambda *_: {"mIoU": next(left)})

    return script


@pytest.fixture
def train(nano_cfg):
    """A function: a training with an evaluation after every iteration; returns its folder."""

    def call(patience=None, **overrides):
        cfg = nano_cfg("dw_conv", **{"train_cfg.val_interval": 1, **overrides})
        cfg.default_hooks.checkpoint.interval = 2
        if patience:
            use_early_stop(cfg, patience)
        build_runner(cfg).train()
        return Path(cfg.work_dir)

    return call


def test_another_length_on_resuming_is_said(nano_cfg):
    def run(length, resume):
        cfg = nano_cfg("dw_conv", **{"train_cfg.max_iters": length})
        for schedule in cfg.param_scheduler:
            schedule.end = max(schedule.get("begin", 0) + 1, length)
        cfg.resume = resume
        build_runner(cfg).train()
        return "".join(path.read_text() for path in sorted(Path(cfg.work_dir).glob("*/*.log")))

    run(2, resume=False)
    assert "the checkpoint's schedule stays" not in run(2, resume=True)
    said = run(4, resume=True)
    assert "the checkpoint's schedule stays" in said and ".end is 2, the config's is 4" in said


def test_the_best_is_kept_and_a_training_that_no_longer_gains_ends(scripted, train):
    scripted(10.0, 30.0, 20.0, 30.0)
    folder = train(patience=2, max_iters=10)
    assert [path.name for path in folder.glob("best_*")] == ["best_mIoU_iter_2.pth"]
    assert sorted(losses(folder)) == [1, 2, 3, 4]
    assert torch.load(folder / "iter_4.pth", weights_only=False)["meta"]["iter"] == 4


def test_a_resumed_training_counts_what_was_before(scripted, train):
    scripted(30.0, 20.0)
    train(patience=2, max_iters=2)
    scripted(10.0)
    folder = train(patience=2, max_iters=10, resume=True)
    # Stopped between two checkpoints of the recipe.
    assert sorted(losses(folder)) == [1, 2, 3] and (folder / "iter_3.pth").is_file()
    scripted()
    train(patience=2, max_iters=10, resume=True)
    assert sorted(losses(folder)) == [1, 2, 3]


def test_every_evaluation_has_a_table_of_the_classes(train, capfd):
    folder = train(max_iters=2)
    (log,) = folder.glob("*/*.log")
    tables = log.read_text().split("per class results:")[1:]
    assert len(tables) == 2
    assert all(name in table for table in tables for name in ("ground", "box", "bar"))


@pytest.mark.parametrize("kind, module", [("Wandb", "wandb"), ("MLflow", "mlflow")])
def test_the_readmes_lines_of_services_that_log(monkeypatch, train, kind, module):
    option = f"visualizer.vis_backends.1.type={kind}VisBackend"
    assert f"`{option}`" in (CONFIGS / "README.md").read_text()
    # In the place of a package that may not be installed, and would ask for an account.
    service = MagicMock()
    monkeypatch.setitem(sys.modules, module, service)
    key, _, value = option.partition("=")
    folder = train(max_iters=2, **{key: value})
    calls = (service.log if kind == "Wandb" else service.log_metrics).call_args_list
    logged = {name for call in calls for name in (*call.args, *call.kwargs.values())[0]}
    assert {"loss", "mIoU"} <= logged
    # What resuming and the report read is written all the same.
    assert list(folder.glob("*/vis_data/scalars.json"))
