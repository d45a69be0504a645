"""A pretraining config made ready to run: data, classes, batches, evaluation."""

import os
from pathlib import Path
from typing import Any

from mmengine.config import Config
from mmengine.logging import print_log
from mmengine.registry import DATASETS
from mmengine.runner import Runner
from torch.utils.data import DataLoader

import backbones
from dense.openmmlab.config import ConfigError, build_runner
from dense.pretraining.data import ImageStream

LOADERS = ("train_dataloader", "val_dataloader")


def set_data(
    cfg: Config,
    data_root: str | None = None,
    train: str | None = None,
    val: str | None = None,
    num_classes: int | None = None,
) -> None:
    """Point a config at images and say how many classes they have.

    Args:
        cfg: changed in place.
        data_root: a folder with ``train`` and ``val`` in it.
        train: the training images, if not in ``data_root``.
        val: the validation images.
        num_classes: of the data and of the network.
    """
    train = train or (str(Path(data_root, "train")) if data_root else None)
    val = val or (str(Path(data_root, "val")) if data_root else None)
    for loader, root in zip(LOADERS, (train, val), strict=True):
        if root:
            cfg[loader].dataset.root = root
        if num_classes is not None:
            cfg[loader].dataset.num_classes = num_classes
    if num_classes is not None:
        cfg.model.num_classes = num_classes


def plan_batches(
    cfg: Config, world_size: int, batch_size: int | None = None, accumulate: int | None = None
) -> str:
    """Keep the recipe's total batch on any number of processes, by gradient accumulation.

    Where it cannot be kept to the image, the learning rates, the last one too, are scaled linearly
    with the total batch; the warm-up starts from a fraction of them.

    Args:
        cfg: changed in place; ``total_batch_size`` is the recipe's.
        world_size: processes.
        batch_size: images a process takes at a time, if not the config's.
        accumulate: batches to an optimizer step; None takes as many as the recipe's total needs.

    Returns:
        What was decided, in a line.
    """
    if batch_size:
        cfg.train_dataloader.batch_size = batch_size
    per_step = cfg.train_dataloader.batch_size * world_size
    recipe = cfg.total_batch_size
    if accumulate is None:
        accumulate = max(1, round(recipe / per_step))
    total = per_step * accumulate
    scale = total / recipe
    cfg.optim_wrapper.accumulative_counts = accumulate
    cfg.optim_wrapper.optimizer.lr *= scale
    for schedule in cfg.param_scheduler:
        if "eta_min" in schedule:
            schedule.eta_min *= scale
    return (
        f"{world_size} x {cfg.train_dataloader.batch_size} images x {accumulate} accumulated = "
        f"{total} a step (recipe: {recipe}), learning rate {cfg.optim_wrapper.optimizer.lr:g}"
    )


def world_size(launcher: str) -> int:
    """Processes that the launcher has started."""
    variable = {"pytorch": "WORLD_SIZE", "slurm": "SLURM_NTASKS", "mpi": "OMPI_COMM_WORLD_SIZE"}
    return int(os.environ.get(variable.get(launcher, ""), 1))


def use_ema(cfg: Config, decay: float) -> None:
    """Average the weights; validation and checkpoints then have the averaged ones.

    Raises:
        ConfigError: not between 0 and 1.
    """
    if not 0 < decay < 1:
        raise ConfigError(f"--ema {decay}: a decay between 0 and 1 is needed, 0.9999 say")
    cfg.custom_hooks.append(dict(type="AveragedWeights", momentum=1 - decay, update_buffers=True))


def build(cfg: Config, training: bool = True, real_labels: str | None = None) -> Runner:
    """Read the data, check it against the config, and build the runner.

    Args:
        cfg: the final config.
        training: whether there will be checkpoints to write.
        real_labels: ReaL's label file, or ``"timm"`` for the copy that timm brings.

    Raises:
        ConfigError: the data is missing or has other classes than the config says, or the model
            cannot be built.
    """
    train, val = (DATASETS.build(cfg[loader].dataset) for loader in LOADERS)
    if train.metainfo != val.metainfo:
        ours, theirs = (dataset.metainfo["classes"] for dataset in (train, val))
        odd = sorted(set(ours) ^ set(theirs))[:3]
        raise ConfigError(
            f"training has {len(ours)} classes, validation {len(theirs)}; only one of them has "
            f"{', '.join(odd)}"
        )
    if cfg.get("sync_bn") and not _cuda():
        print_log("no CUDA here: SyncBN steps back to BN", logger="current")
        cfg.sync_bn = None
    cfg.model.classes = train.metainfo["classes"]
    if real_labels:
        if real_labels != "timm" and not Path(real_labels).is_file():
            raise ConfigError(f"no label file at {real_labels}")
        cfg.val_evaluator.real_labels = real_labels
    cfg.val_evaluator.out_dir = str(Path(cfg.work_dir, "evaluation"))
    if not training:
        cfg.default_hooks.checkpoint = None
    runner = build_runner(cfg)
    # The data sets as they are: a walk through a million files is not to be done twice.
    runner._train_dataloader = _loader(cfg.train_dataloader, train)
    runner._val_dataloader = _loader(cfg.val_dataloader, val)
    if real_labels:
        filenames = [val.filename(index) for index in range(len(val))]
        runner._val_evaluator = dict(cfg.val_evaluator, filenames=filenames)
    return runner


def evaluate(runner: Runner, checkpoint: str) -> dict[str, float]:
    """The metrics of a checkpoint, of whoever's names, on the validation images.

    Raises:
        CheckpointError: it cannot be read, or lacks the classifier.
    """
    network = runner.model.module.network if runner.distributed else runner.model.network
    classes = runner.cfg.model.classes
    report = backbones.load_checkpoint(network, checkpoint, classes=classes)
    lacking = [name for name in report.missing if not name.endswith("num_batches_tracked")]
    if lacking:
        raise backbones.CheckpointError(
            f"{checkpoint} cannot be evaluated: it has no {', '.join(lacking)} for the "
            f"{len(classes)} classes here"
        )
    return runner.val()


def _loader(cfg: dict[str, Any], dataset: Any) -> dict[str, Any] | DataLoader:
    if not isinstance(dataset, ImageStream):
        return dict(cfg, dataset=dataset)
    # A stream has its own order, and cannot be copied, which mmengine does with what it builds.
    not_torchs = ("dataset", "sampler", "collate_fn")
    return DataLoader(dataset, **{k: v for k, v in cfg.items() if k not in not_torchs})


def _cuda() -> bool:
    import torch

    return torch.cuda.is_available()
