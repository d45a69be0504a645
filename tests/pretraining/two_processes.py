"""Trainings with what differs from one number of processes to another taken out.

A hook writes every iteration's loss of every process into ``losses_<rank>.json`` there.
"""

import json
import os
from pathlib import Path

from mmengine.dist import get_rank
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from torch.nn.modules.batchnorm import _BatchNorm

from tests.support import ROOT, run_script


@HOOKS.register_module(force=True)
class PlainLosses(Hook):
    """Statistics of batch norms frozen, since gloo knows no SyncBN; losses kept."""

    def before_train(self, runner):
        self.losses = []

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        for module in runner.model.modules():
            if isinstance(module, _BatchNorm):
                module.eval()

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        self.losses.append(float(outputs["loss"]))

    def after_train(self, runner):
        Path(runner.work_dir, f"losses_{get_rank()}.json").write_text(json.dumps(self.losses))


def options(names: str) -> list[str]:
    """The config's changes; nothing in them is random but the weights and the order of images."""
    return [
        "--cfg-options",
        "train_cfg.max_epochs=2",
        "randomness.seed=3",
        "custom_hooks.1.type=PlainLosses",
        "total_batch_size=8",
        "val_dataloader.batch_size=2",
        "train_dataloader.dataset.transform.is_training=False",
        # The schedule moves with batches, not with steps.
        "param_scheduler=[]",
        *(f"{loader}_dataloader.num_workers=0" for loader in ("train", "val")),
        *(f"{loader}_dataloader.persistent_workers=False" for loader in ("train", "val")),
        f"experiment_name={names}",
    ]


def train(trainings: list[list[str]], rank: int = 0, port: int = 0) -> None:
    """Run the tool once for each list of arguments, as one of torchrun's two processes if a port
    to meet at is given."""
    if port:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    for words in trainings:
        run_script(ROOT / "tools/pretrain.py", *words)
