"""The hook that says and records what a training is."""

import logging
from collections.abc import Iterable
from pathlib import Path

from detectron2.data.common import AspectRatioGroupedDataset, ToIterableDataset
from detectron2.engine import HookBase
from detectron2.utils import comm
from omegaconf import DictConfig
from torch.utils.data import DataLoader

from dense import journal
from dense.seeding import SeededDataset

_logger = logging.getLogger(__name__)


class Announce(HookBase):
    """Log the first line of a training and keep its ``run.json``: see :mod:`dense.journal`.

    Args:
        cfg: the config.
        last: the checkpoint that a resumed training goes on from, or None.
        config_file: the file that the command line names.
    """

    def __init__(self, cfg: DictConfig, last: Path | str | None, config_file: str | None):
        self._cfg, self._last, self._config_file = cfg, last, config_file

    def before_train(self) -> None:
        """Log what the training starts with."""
        cfg, trainer = self._cfg, self.trainer
        if self._last is not None:
            weights = f"resumed from {self._last} at iteration {trainer.start_iter}"
        elif cfg.train.init_checkpoint:
            weights = f"weights of {cfg.train.init_checkpoint}"
        else:
            weights = journal.weights(trainer.model)
        start = journal.Start(
            device=journal.device_name(cfg.train.device, comm.get_world_size()),
            precision=cfg.train.amp.get("precision", "float16")
            if cfg.train.amp.enabled
            else "float32",
            batch=cfg.dataloader.train.total_batch_size,
            images=_images(trainer.data_loader),
            steps=cfg.train.max_iter,
            weights=weights,
        )
        _logger.info(str(start))
        journal.begin(cfg.train.output_dir, start, self._config_file)


def _images(loader: Iterable) -> int | None:
    """Number of images behind a loader, whose batches Detectron2 wraps several times.

    None if it has no length.
    """
    while isinstance(
        loader, DataLoader | AspectRatioGroupedDataset | ToIterableDataset | SeededDataset
    ):
        loader = loader.dataset
    return len(loader) if hasattr(loader, "__len__") else None
