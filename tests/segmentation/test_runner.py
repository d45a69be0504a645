"""The runner: nano twins train, kills lose nothing, unsafe and unfitting files are refused."""

import logging
import os
import pickle
from pathlib import Path

import mmengine.runner.runner as mmengine_runner
import numpy as np
import pytest
import timm
import torch
from mmengine.logging import HistoryBuffer
from mmengine.optim import AmpOptimWrapper
from torch import nn

from backbones import FAMILIES, CheckpointError
from dense.openmmlab import checkpoints
from dense.openmmlab.hooks import StopOnNonFiniteLoss
from dense.segmentation.config import build_runner, use_amp
from dense.segmentation.data import ConfigError


def log_of(runner):
    return (Path(runner.log_dir) / f"{runner.timestamp}.log").read_text()


def train(cfg):
    runner = build_runner(cfg)
    runner.train()
    return runner


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_nano_twin_trains_and_evaluates(family, nano_cfg):
    cfg = nano_cfg(family, max_iters=1)
    cfg.train_cfg.val_interval = 1
    runner = build_runner(cfg)
    before = {n: p.detach().clone() for n, p in runner.model.named_parameters()}
    runner.train()
    moved = [not p.equal(before[n]) for n, p in runner.model.named_parameters()]
    assert sum(moved) > 0.9 * len(moved)
    assert "mIoU" in log_of(runner)
    assert Path(cfg.work_dir, "iter_1.pth").is_file()
    assert list(Path(cfg.work_dir).rglob("scalars.json"))
    assert list(Path(cfg.work_dir).rglob("events.out.tfevents.*"))


@pytest.mark.slow
def test_syncbn_and_amp_step_back_without_cuda_and_say_so(nano_cfg, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    cfg = nano_cfg(max_iters=1)
    use_amp(cfg)
    runner = build_runner(cfg)
    assert not any(isinstance(m, nn.SyncBatchNorm) for m in runner.model.modules())
    assert any(isinstance(m, nn.BatchNorm2d) for m in runner.model.decode_head.modules())
    runner.train()
    assert "AMP falls back to float32" in log_of(runner)
    assert type(runner.optim_wrapper).__name__ == "OptimWrapper"


@pytest.mark.parametrize(
    ("cuda", "native", "dtype", "scale"),
    [(True, True, "bfloat16", 1.0), (True, False, "float16", "dynamic")]
    + [(False, False, "float16", "dynamic")],
)
def test_amp_is_bfloat16_where_the_gpu_computes_in_it(
    nano_cfg, monkeypatch, cuda, native, dtype, scale
):
    """A V100 emulates it only, which PyTorch counts as support unless told otherwise."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(
        torch.cuda,
        "is_bf16_supported",
        lambda including_emulation=True: including_emulation or native,
    )
    cfg = nano_cfg()
    use_amp(cfg)
    wrapper = cfg.optim_wrapper
    assert (wrapper.type, wrapper.dtype) == ("AmpOptimWrapper", dtype)
    assert wrapper.loss_scale == scale
    cfg = nano_cfg(**{"optim_wrapper.dtype": "float16"})
    use_amp(cfg)
    assert (cfg.optim_wrapper.dtype, cfg.optim_wrapper.loss_scale) == ("float16", "dynamic")


@pytest.mark.parametrize(
    ("family", "dtype", "warns"),
    [("i_d_dw_conv", "float16", 1), ("i_d_dw_conv", None, 1)]
    + [("i_d_dw_conv", "bfloat16", 0), ("dw_conv", "float16", 0)],
)
def test_float16_with_i_d_dw_warns(nano_cfg, monkeypatch, family, dtype, warns):
    """Without a dtype, autocast takes float16."""
    module = "mmengine.optim.optimizer.amp_optimizer_wrapper"
    monkeypatch.setattr(f"{module}.is_cuda_available", lambda: True)
    runner = build_runner(nano_cfg(family))
    optimizer = torch.optim.SGD(runner.model.parameters(), lr=1.0)
    wrapper = AmpOptimWrapper(optimizer=optimizer, dtype=dtype)
    assert runner.build_optim_wrapper(wrapper) is wrapper
    lines = log_of(runner).splitlines()
    assert sum("float16 AMP with I-D-DW-Conv" in line for line in lines) == warns


def test_amp_of_an_unknown_wrapper_is_refused(nano_cfg):
    cfg = nano_cfg()
    cfg.optim_wrapper.type = "ApexOptimWrapper"
    with pytest.raises(ConfigError, match="ApexOptimWrapper"):
        use_amp(cfg)


@pytest.mark.slow
def test_init_fills_the_backbone_and_reports(nano_cfg, tmp_path):
    classifier = timm.create_model("i_d_dw_conv_nano")
    torch.save({"model": classifier.state_dict()}, tmp_path / "init.pth")
    cfg = nano_cfg(max_iters=1, **{"model.backbone.init": str(tmp_path / "init.pth")})
    cfg.optim_wrapper.optimizer.lr = 0.0
    runner = train(cfg)
    learned = dict(runner.model.backbone.named_parameters())
    for name, parameter in classifier.named_parameters():
        if not name.startswith(("head.", "norm.")):
            torch.testing.assert_close(learned[name], parameter, rtol=0, atol=0)
    assert " matched, " in log_of(runner)


@pytest.mark.slow
def test_resuming_is_as_if_never_stopped(nano_cfg, tmp_path):
    classifier = timm.create_model("i_d_dw_conv_nano")
    init = tmp_path / "init.pth"
    torch.save(classifier.state_dict(), init)
    options = {"model.backbone.init": str(init), "default_hooks.checkpoint.interval": 2}

    whole = nano_cfg(max_iters=4, **options)
    whole.work_dir = str(tmp_path / "whole")
    train(whole)
    straight = checkpoints.read(tmp_path / "whole/iter_4.pth")

    # Stopped at 2, at 3 the kill came in the middle of writing; the init is gone since.
    stopped = nano_cfg(max_iters=4, **options)
    stopped.work_dir = str(tmp_path / "stopped")
    (tmp_path / "stopped").mkdir()
    content = (tmp_path / "whole/iter_2.pth").read_bytes()
    (tmp_path / "stopped/iter_2.pth").write_bytes(content)
    (tmp_path / "stopped/iter_3.pth").write_bytes(content[:-1000])
    (tmp_path / "stopped/last_checkpoint").write_text(str(tmp_path / "stopped/iter_3.pth"))
    init.unlink()
    stopped.resume = True
    runner = train(stopped)
    log = log_of(runner)
    assert "iter_3.pth is truncated or damaged" in log and "iter_2.pth" in log
    resumed = checkpoints.read(tmp_path / "stopped/iter_4.pth")
    for name, value in straight["state_dict"].items():
        torch.testing.assert_close(resumed["state_dict"][name], value, msg=name)
    assert straight["optimizer"]["state"].keys() == resumed["optimizer"]["state"].keys()
    assert resumed["meta"]["iter"] == 4


@pytest.mark.slow
def test_nothing_to_resume_starts_afresh_and_says_so(nano_cfg):
    cfg = nano_cfg(max_iters=1)
    cfg.resume = True
    runner = train(cfg)
    assert "no checkpoint to resume" in log_of(runner)
    assert Path(cfg.work_dir, "iter_1.pth").is_file()


@pytest.mark.slow
def test_a_kill_while_writing_leaves_the_last_checkpoint(nano_cfg, monkeypatch):
    cfg = nano_cfg(max_iters=1)
    runner = train(cfg)
    good = Path(cfg.work_dir, "iter_1.pth").read_bytes()

    def killed(checkpoint, filename, **kwargs):
        Path(filename).write_bytes(good[:5000])
        raise KeyboardInterrupt

    monkeypatch.setattr(mmengine_runner, "save_checkpoint", killed)
    for name in ("iter_1.pth", "iter_2.pth"):
        with pytest.raises(KeyboardInterrupt):
            runner.save_checkpoint(cfg.work_dir, name)
    assert checkpoints.newest_whole(cfg.work_dir) == (Path(cfg.work_dir, "iter_1.pth"), [])
    assert Path(cfg.work_dir, "iter_1.pth").read_bytes() == good


def test_the_newest_is_by_number(tmp_path):
    for number in (9, 10, 100):
        torch.save({"number": number}, tmp_path / f"iter_{number}.pth")
    torch.save({}, tmp_path / "best_mIoU_iter_999.pth")
    assert checkpoints.newest_whole(tmp_path) == (tmp_path / "iter_100.pth", [])
    # Whole in length, but a byte of a tensor has turned.
    torch.save({"weight": torch.ones(1000)}, tmp_path / "iter_200.pth")
    content = bytearray((tmp_path / "iter_200.pth").read_bytes())
    content[len(content) // 2] ^= 1
    (tmp_path / "iter_200.pth").write_bytes(content)
    expected = (tmp_path / "iter_100.pth", [tmp_path / "iter_200.pth"])
    assert checkpoints.newest_whole(tmp_path) == expected
    assert checkpoints.newest_whole(tmp_path / "none") == (None, [])
    # An epoch's number is no iteration's: the files say how many they have.
    torch.save({"meta": {"iter": 400}}, tmp_path / "iter_400.pth")
    torch.save({"meta": {"iter": 500}}, tmp_path / "epoch_3.pth")
    assert checkpoints.newest_whole(tmp_path)[0] == tmp_path / "epoch_3.pth"


def test_log_buffers_are_read_and_still_work(tmp_path):
    buffer = HistoryBuffer([1.0, 2.0, 6.0], [1, 1, 1])
    torch.save({"log": buffer, "value": np.float64(0.5)}, tmp_path / "a.pth")
    with pytest.raises(pickle.UnpicklingError):
        torch.load(tmp_path / "a.pth", weights_only=True)
    content = checkpoints.read(tmp_path / "a.pth")
    assert content["log"].statistics("mean") == 3.0 and content["log"].current() == 6.0
    assert content["value"] == 0.5


class Reaching:
    """Pickles as a getattr on something reachable, the way out of a weights-only reader."""

    def __init__(self, owner, name):
        self.owner, self.name = owner, name

    def __reduce__(self):
        return getattr, (self.owner, self.name)


class Calling:
    def __reduce__(self):
        return os.system, ("true",)


def test_a_refused_file_is_refused_again_without_weights_only(tmp_path, monkeypatch):
    """As onedl-mmengine's reader asks for it a second time."""
    torch.save(Calling(), tmp_path / "a.pth")
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    with checkpoints.safe_reading(), pytest.raises(pickle.UnpicklingError):
        torch.load(tmp_path / "a.pth", weights_only=False)
    assert os.environ["TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"] == "1"
    assert "TORCH_FORCE_WEIGHTS_ONLY_LOAD" not in os.environ


@pytest.mark.parametrize(
    "content",
    [
        Reaching(HistoryBuffer, "__init__"),
        Reaching(HistoryBuffer, "register_statistics"),
        Reaching(np.ndarray, "min"),
        Calling(),
    ],
    ids=["init", "register", "ndarray", "system"],
)
def test_code_in_a_checkpoint_is_refused(content, tmp_path):
    torch.save({"state_dict": {}, "x": content}, tmp_path / "a.pth")
    with pytest.raises(CheckpointError, match=r"a\.pth"):
        checkpoints.read(tmp_path / "a.pth")


@pytest.mark.slow
def test_a_checkpoint_of_another_model_is_refused(nano_cfg, tmp_path):
    cfg = nano_cfg("dw_conv", max_iters=1)
    train(cfg)
    other = nano_cfg("swin")
    other.work_dir = str(tmp_path / "other")
    other.load_from = str(Path(cfg.work_dir, "iter_1.pth"))
    with pytest.raises(
        CheckpointError, match="iter_1.pth is of dw_conv_nano, the config of swin_nano"
    ):
        build_runner(other).test()


@pytest.mark.slow
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_stops_and_is_named(nano_cfg, value):
    cfg = nano_cfg(max_iters=3)
    runner = build_runner(cfg)
    step = runner.model.train_step

    def broken(*args, **kwargs):
        losses = step(*args, **kwargs)
        if runner.iter == 1:
            losses["decode.loss_ce"] = torch.tensor(value)
        return losses

    runner.model.train_step = broken
    assert any(isinstance(hook, StopOnNonFiniteLoss) for hook in runner.hooks)
    with pytest.raises(FloatingPointError, match=r"iteration 2: decode\.loss_ce="):
        runner.train()
    assert not list(Path(cfg.work_dir).glob("*.pth"))


def test_an_unknown_backbone_is_answered_with_the_names(nano_cfg):
    with pytest.raises(ConfigError, match=r"'dw_conv_huge'.*swin_nano.*i_d_dw_conv_base"):
        build_runner(nano_cfg(**{"model.backbone.type": "dw_conv_huge"}))


def test_logs_reach_the_run_once(nano_cfg, caplog):
    runner = build_runner(nano_cfg())
    logging.getLogger("dense.backbone").info("a report")
    assert log_of(runner).count("a report") == 1
