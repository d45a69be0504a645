"""Long tests on real photos: learning through a kill, two processes, full-size networks."""

import os
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from mmengine.optim import build_optim_wrapper
from mmengine.registry import init_default_scope
from mmengine.structures import PixelData
from mmseg.registry import MODELS
from mmseg.structures import SegDataSample
from PIL import Image

from dense.backbone import revert_sync_batchnorm
from dense.recipes import RECIPES
from dense.segmentation import load_predictor
from dense.segmentation.config import load_config
from tests.support import ROOT, environment, losses

CONFIGS = RECIPES / "segmentation"
ITERATIONS = 160
pytestmark = pytest.mark.e2e


def command(ade_slice, work_dir, *options, launcher=()):
    return [
        *(launcher or [sys.executable]),
        str(ROOT / "tools/train_segmentor.py"),
        str(CONFIGS / "i_d_dw_conv_nano_upernet.py"),
        *("--data-root", str(ade_slice), "--work-dir", str(work_dir), "--short-side", "128"),
        *(("--launcher", "pytorch") if launcher else ()),
        *(option for option in options if option.startswith("--")),
        *("--cfg-options", "train_dataloader.batch_size=4", "val_dataloader.num_workers=1"),
        *(option for option in options if not option.startswith("--")),
    ]


def test_learns_real_photos_through_a_kill(ade_slice, tmp_path):
    arguments = (
        f"train_cfg.max_iters={ITERATIONS}",
        f"train_cfg.val_interval={ITERATIONS}",
        f"param_scheduler.1.end={ITERATIONS}",
        "default_hooks.checkpoint.interval=40",
        "default_hooks.logger.interval=1",
        "log_processor.window_size=1",
    )
    work = tmp_path / "work"
    with (tmp_path / "first.log").open("w") as log:
        first = subprocess.Popen(
            command(ade_slice, work, *arguments),
            stdout=log,
            stderr=log,
            env=environment(CUDA_VISIBLE_DEVICES=""),
            start_new_session=True,
        )
        while not (work / "iter_80.pth").is_file():
            assert first.poll() is None, (tmp_path / "first.log").read_text()[-3000:]
            time.sleep(0.2)
        os.killpg(first.pid, signal.SIGKILL)
        first.wait()
    assert not (work / f"iter_{ITERATIONS}.pth").exists()

    second = subprocess.run(
        command(ade_slice, work, *arguments, "--resume"),
        capture_output=True,
        text=True,
        env=environment(CUDA_VISIBLE_DEVICES=""),
    )
    log = second.stdout + second.stderr
    assert second.returncode == 0, log[-3000:]
    resumed = int(re.search(r"resumed epoch: 0, iter: (\d+)", log)[1])
    assert resumed in (80, 120)
    found = losses(work)
    assert sorted(found) == list(range(1, ITERATIONS + 1))
    curve = np.array([found[i]["loss"] for i in sorted(found)])
    tenth = ITERATIONS // 10
    print(f"loss {curve[:tenth].mean():.2f} -> {curve[-tenth:].mean():.2f}")
    assert curve[-tenth:].mean() < 0.75 * curve[:tenth].mean()
    assert "mIoU" in log and "eta: " in log

    predict = load_predictor(
        str(work / "i_d_dw_conv_nano_upernet.py"), str(work / f"iter_{ITERATIONS}.pth")
    )
    photo = next((ade_slice / "images/validation").iterdir())
    image = np.asarray(Image.open(photo).convert("RGB"))
    labels = predict(image)
    assert labels.shape == image.shape[:2] and 0 <= labels.min() and labels.max() < 150
    assert len(np.unique(labels)) > 1


def test_two_processes_train_on_a_cpu(ade_slice, tmp_path):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = subprocess.run(
        command(
            *(ade_slice, tmp_path, "train_cfg.max_iters=3", "train_cfg.val_interval=3"),
            "--amp",
            launcher=torchrun,
        ),
        capture_output=True,
        text=True,
        env=environment(CUDA_VISIBLE_DEVICES=""),
    )
    log = done.stdout + done.stderr
    assert done.returncode == 0, log[-3000:]
    for message in ("2 processes on the CPU over gloo", "SyncBN falls back", "AMP falls back"):
        assert log.count(message) >= 1, message
    assert (tmp_path / "iter_3.pth").is_file() and "mIoU" in log


@pytest.mark.parametrize("family", ["swin", "d_dw_conv"])
def test_tiny_trains_a_step_and_evaluates_one(family, ade_slice):
    cfg = load_config(CONFIGS / f"{family}_tiny_upernet_8xb2-160k_ade20k-512x512.py")
    cfg.model.data_preprocessor.size = (128, 128)
    # Drop path may leave a whole block without gradients in a single step.
    cfg.model.backbone.update(init=None, drop_path_rate=0.0)
    init_default_scope("mmseg")
    torch.manual_seed(0)
    model = revert_sync_batchnorm(MODELS.build(cfg.model))
    model.init_weights()
    optim_wrapper = build_optim_wrapper(model, cfg.optim_wrapper)

    batch = dict(inputs=[], data_samples=[])
    for photo in sorted((ade_slice / "images/training").iterdir())[:2]:
        mask = ade_slice / f"annotations/training/{photo.stem}.png"
        image = np.array(Image.open(photo).convert("RGB").resize((128, 128)))[..., ::-1].copy()
        labels = np.array(Image.open(mask).resize((128, 128), Image.Resampling.NEAREST))
        sample = SegDataSample(metainfo=dict(ori_shape=(128, 128), img_shape=(128, 128)))
        sample.gt_sem_seg = PixelData(data=torch.from_numpy(labels - 1)[None].long())
        batch["inputs"].append(torch.from_numpy(image).permute(2, 0, 1))
        batch["data_samples"].append(sample)

    before = [p.detach().clone() for p in model.parameters()]
    losses = model.train().train_step(batch, optim_wrapper)
    assert losses["loss"].isfinite()
    moved = [not p.equal(old) for p, old in zip(model.parameters(), before, strict=True)]
    assert all(moved)
    (result,) = model.eval().test_step({key: value[:1] for key, value in batch.items()})
    assert result.pred_sem_seg.data.shape == (1, 128, 128)
