"""A segmentor's training that was stopped and resumed is the one that was not, bit for bit."""

import os
import signal
from pathlib import Path

import pytest
import torch
from mmengine.hooks import Hook
from mmengine.registry import HOOKS

from backbones import CheckpointError
from dense import files
from dense.runs import Stopped
from dense.segmentation.config import build_runner
from tests.support import assert_same, losses

pytestmark = pytest.mark.slow


def test_stopped_and_resumed(nano_cfg, tmp_path, workers=2):
    def train(name: str, resume: bool = False) -> Path:
        cfg = nano_cfg("i_d_dw_conv", max_iters=5)
        cfg.work_dir = str(tmp_path / name)
        cfg.experiment_name = f"{name}-{resume}-{workers}"
        cfg.resume = resume
        cfg.randomness = dict(seed=11)
        cfg.train_cfg.val_interval = 100
        cfg.model.backbone.drop_path_rate = 0.3
        cfg.default_hooks.checkpoint.update(interval=1, max_keep_ckpts=-1)
        cfg.default_hooks.logger.interval = 1
        cfg.train_dataloader.num_workers = workers
        pipeline = cfg.train_dataloader.dataset.pipeline
        pipeline.insert(-1, dict(type="RandomFlip", prob=0.5))
        pipeline.insert(-1, dict(type="PhotoMetricDistortion"))
        build_runner(cfg).train()
        return Path(cfg.work_dir)

    whole, parts = train("whole"), train("parts")
    for number in (3, 4, 5):
        (parts / f"iter_{number}.pth").unlink()
    for log in parts.glob("*/vis_data/scalars.json"):
        log.write_text("")
    train("parts", resume=True)

    expected, found = losses(whole), losses(parts)
    assert set(found) == {3, 4, 5}
    assert all(found[step] == expected[step] for step in found)
    one, two = (torch.load(w / "iter_5.pth", weights_only=False) for w in (whole, parts))
    assert_same(one["state_dict"], two["state_dict"])
    assert_same(one["optimizer"], two["optimizer"])


class Killed(BaseException):
    pass


@HOOKS.register_module(force=True)
class Interruption(Hook):
    """Sends SIGTERM in an iteration, or raises Killed in a validation."""

    def __init__(self, iteration: int = 0, validation_at: int = 0):
        self.iteration, self.validation_at = iteration, validation_at

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        if runner.iter + 1 == self.iteration:
            os.kill(os.getpid(), signal.SIGTERM)

    def after_val_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        if runner.iter == self.validation_at:
            raise Killed


@pytest.fixture
def keep_handlers():
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    yield
    for number, handler in zip((signal.SIGINT, signal.SIGTERM), before, strict=True):
        signal.signal(number, handler)


def test_signals_and_validations_cut_off(nano_cfg, tmp_path, keep_handlers):
    def train(name: str, resume: bool = False, **interruption) -> Path:
        cfg = nano_cfg("dw_conv", max_iters=4)
        cfg.work_dir = str(tmp_path / name)
        cfg.experiment_name = f"{name}-{resume}-signals"
        cfg.resume, cfg.randomness = resume, dict(seed=11)
        cfg.train_cfg.val_interval = 2
        cfg.default_hooks.checkpoint.update(interval=2, max_keep_ckpts=-1)
        cfg.default_hooks.logger.interval = 1
        # A config's own hooks do not replace those that stop and seed.
        cfg.custom_hooks = [dict(type="Interruption", **interruption)]
        build_runner(cfg).train()
        return Path(cfg.work_dir)

    def validations(folder: Path) -> dict[int, float]:
        lines = [e for log in folder.glob("*/vis_data/scalars.json") for e in files.json_lines(log)]
        return {line["step"]: line["mIoU"] for line in lines if "mIoU" in line}

    whole = train("whole")
    with pytest.raises(Stopped) as stopped:
        train("stopped", iteration=3)
    assert stopped.value.status == 143
    assert stopped.value.checkpoint == str(tmp_path / "stopped/iter_3.pth")
    assert not (tmp_path / "stopped/iter_4.pth").exists()
    with pytest.raises(Killed):
        train("killed", validation_at=2)
    assert not validations(tmp_path / "killed")
    expected = torch.load(whole / "iter_4.pth", weights_only=False)
    assert sorted(validations(whole)) == [2, 4]
    for name in ("stopped", "killed"):
        found = train(name, resume=True)
        assert validations(found) == validations(whole)
        resumed = torch.load(found / "iter_4.pth", weights_only=False)
        assert_same(expected["state_dict"], resumed["state_dict"])
        assert_same(expected["optimizer"], resumed["optimizer"])


def test_what_cannot_be_resumed_is_named_and_left_as_it_is(nano_cfg, tmp_path):
    def config(family: str = "dw_conv", resume: bool = True, **changes):
        cfg = nano_cfg(family, max_iters=1)
        cfg.work_dir, cfg.resume = str(tmp_path / "run"), resume
        cfg.experiment_name = f"{family}-{resume}-{sorted(changes)}"
        cfg.merge_from_dict(changes)
        return cfg

    first = config(resume=False)
    build_runner(first).train()
    kept = {p.name: p.read_bytes() for p in (tmp_path / "run").glob("*.p*")}
    assert {"iter_1.pth"} < kept.keys()

    def refused(cfg, reason):
        with pytest.raises(CheckpointError, match=reason):
            build_runner(cfg).train()
        assert {p.name: p.read_bytes() for p in (tmp_path / "run").glob("*.p*")} == kept

    refused(config("d_dw_conv"), "iter_1.pth is of dw_conv_nano, the config of d_dw_conv_nano")
    other = {"train_dataloader.dataset.metainfo.classes": ("box", "ground", "bar")}
    refused(config(**other), "trained on the classes ground,box,bar; .*box,ground,bar in another")

    content = torch.load(tmp_path / "run/iter_1.pth", weights_only=False)
    content["state_dict"]["backbone.patch_embed.proj.bias"][3] = float("nan")
    torch.save(content, tmp_path / "run/iter_1.pth")
    kept["iter_1.pth"] = (tmp_path / "run/iter_1.pth").read_bytes()
    refused(config(), "patch_embed.proj.bias has NaN or infinite values")

    whole = (tmp_path / "run/iter_1.pth").read_bytes()
    (tmp_path / "run/iter_1.pth").write_bytes(whole[: len(whole) // 2])
    kept["iter_1.pth"] = whole[: len(whole) // 2]
    refused(config(), "iter_1.pth is truncated or damaged, and .*run has no other")


def test_weights_that_are_not_finite_are_not_written(nano_cfg, tmp_path):
    cfg = nano_cfg("dw_conv", max_iters=1)
    cfg.work_dir = str(tmp_path / "run")
    runner = build_runner(cfg)
    runner.train()
    (tmp_path / "run/iter_1.pth").unlink()
    with torch.no_grad():
        runner.model.backbone.patch_embed.proj.bias[0] = float("inf")
    with pytest.raises(FloatingPointError, match="backbone.patch_embed.proj.bias and 0 other"):
        runner.save_checkpoint(str(tmp_path / "run"), "iter_1.pth", by_epoch=False)
    assert not (tmp_path / "run/iter_1.pth").exists()
