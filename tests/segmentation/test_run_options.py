"""Length of a training, the best checkpoint, early stopping, the services that log."""

import sys
from pathlib import Path
from unittest.mock import MagicMock

import pytest
import torch
from mmengine.config import Config
from mmseg.evaluation import IoUMetric

from dense.openmmlab.config import ConfigError, set_length, use_early_stop
from dense.recipes import RECIPES
from dense.segmentation.config import build_runner, load_config
from tests.support import losses

pytestmark = pytest.mark.slow

CONFIGS = RECIPES / "segmentation"
FULL_SIZE = "dw_conv_tiny_upernet_8xb2-160k_ade20k-512x512"


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


def test_half_of_160k_is_mmsegmentations_80k():
    """But for warm-up, which is halved too."""
    import mmseg

    ours = load_config(CONFIGS / f"{FULL_SIZE}.py")
    set_length(ours, "iters", 80_000)
    package = Path(mmseg.__file__).parent
    theirs = Config.fromfile(package / ".mim/configs/_base_/schedules/schedule_80k.py")
    assert ours.train_cfg.max_iters == theirs.train_cfg.max_iters
    assert ours.train_cfg.val_interval == theirs.train_cfg.val_interval
    assert ours.param_scheduler[1].end == theirs.param_scheduler[0].end
    assert (ours.param_scheduler[0].end, ours.param_scheduler[1].begin) == (750, 750)
    assert ours.default_hooks.checkpoint.interval == 2000


def test_a_few_iterations_have_a_warm_up_and_an_evaluation():
    cfg = load_config(CONFIGS / "dw_conv_nano_upernet.py")
    set_length(cfg, "iters", 6)
    warm_up, decay = cfg.param_scheduler
    assert (warm_up.begin, warm_up.end, decay.begin, decay.end) == (0, 1, 1, 6)
    assert (cfg.train_cfg.max_iters, cfg.train_cfg.val_interval) == (6, 3)
    assert cfg.default_hooks.checkpoint.interval == 1
    with pytest.raises(ConfigError, match="--epochs: .*nano_upernet.py has no train_cfg.max_epoch"):
        set_length(cfg, "epochs", 6)


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


def test_early_stop_needs_a_metric():
    cfg = load_config(CONFIGS / "dw_conv_nano_upernet.py")
    cfg.default_hooks.checkpoint.pop("save_best")
    with pytest.raises(ConfigError, match="--early-stop: default_hooks.checkpoint.save_best"):
        use_early_stop(cfg, 2)


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
    train(max_iters=2, **{key: value})
    calls = (service.log if kind == "Wandb" else service.log_metrics).call_args_list
    logged = {name for call in calls for name in (*call.args, *call.kwargs.values())[0]}
    assert {"loss", "mIoU"} <= logged
