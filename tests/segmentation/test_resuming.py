"""A segmentor's training that was stopped and resumed is the one that was not, bit for bit."""

from pathlib import Path

import pytest
import torch

from dense.segmentation.config import build_runner
from tests.support import assert_same, losses


@pytest.mark.parametrize("workers", [0, 2])
def test_stopped_and_resumed(nano_cfg, tmp_path, workers):
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
