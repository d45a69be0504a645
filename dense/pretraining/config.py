"""Prepares a pretraining config: data, classes, batches, evaluation."""

import os
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from mmengine.logging import print_log
from mmengine.registry import DATASETS
from mmengine.runner import Runner
from torch.utils.data import DataLoader

import backbones
from dense.export.files import is_exported
from dense.openmmlab.config import ConfigError, build_runner
from dense.pretraining.data import ImageStream
from dense.waiting import waiting

LOADERS = ("train_dataloader", "val_dataloader")


def set_data(
    cfg: Config,
    data_root: str | None = None,
    train: str | None = None,
    val: str | None = None,
    num_classes: int | None = None,
) -> None:
    """Set the image folders and the number of classes of a config.

    >>> set_data(cfg, "photos", num_classes=10)

    Args:
        cfg: changed in place.
        data_root: a folder with ``train`` and ``val`` in it.
        train: the training images; None takes ``data_root/train``.
        val: the validation images; None takes ``data_root/val``.
        num_classes: classes of the data sets and the network; None keeps the config's.
    """
    for split, root in (("train", train), ("val", val)):
        dataset = cfg[f"{split}_dataloader"].dataset
        if root or data_root:
            dataset.root = root or str(Path(data_root, split))
        if num_classes is not None:
            dataset.num_classes = num_classes
    if num_classes is not None:
        cfg.model.num_classes = num_classes


def plan_batches(
    cfg: Config, world_size: int, batch_size: int | None = None, accumulate: int | None = None
) -> str:
    """Keep the recipe's total batch size on any number of processes, by gradient accumulation.

    If the total differs from the recipe's, the learning rate and the schedule's ``warmup_lr`` and
    ``eta_min`` are scaled linearly with it.

    Args:
        cfg: changed in place; ``total_batch_size`` is the recipe's.
        world_size: number of processes.
        batch_size: images per process and batch; None keeps the config's.
        accumulate: batches per optimizer step; None takes the number closest to the recipe's total.

    Returns:
        A line for the log that describes the result.
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
        for key in {"warmup_lr", "eta_min"} & set(schedule):
            schedule[key] *= scale
    return (
        f"{world_size} x {cfg.train_dataloader.batch_size} images x {accumulate} accumulated = "
        f"{total} a step (recipe: {recipe}), learning rate {cfg.optim_wrapper.optimizer.lr:g}"
    )


def anneal_after_warmup(cfg: Config) -> None:
    """Start the cosine after warm-up instead of at step 0, as Swin since October 2022.

    Raises:
        ConfigError: the config has no ``WarmupCosineLR``.
    """
    schedules = [s for s in cfg.param_scheduler if s.type == "WarmupCosineLR"]
    if not schedules:
        raise ConfigError(f"--anneal-after-warmup: {cfg.filename} has no WarmupCosineLR")
    for schedule in schedules:
        schedule.warmup_prefix = True


def world_size(launcher: str | None) -> int:
    """Number of processes that the launcher started, 1 without a launcher."""
    variable = {"pytorch": "WORLD_SIZE", "slurm": "SLURM_NTASKS", "mpi": "OMPI_COMM_WORLD_SIZE"}
    return int(os.environ.get(variable.get(launcher, ""), 1))


def use_ema(cfg: Config, decay: float) -> None:
    """Average the weights (EMA); validation and checkpoints use the averaged ones.

    Raises:
        ConfigError: ``decay`` is not between 0 and 1.
    """
    if not 0 < decay < 1:
        raise ConfigError(f"--ema {decay}: a decay between 0 and 1 is needed, such as 0.9999")
    cfg.custom_hooks.append(dict(type="AveragedWeights", momentum=1 - decay, update_buffers=True))


def build(cfg: Config, training: bool = True, real_labels: str | None = None) -> Runner:
    """Build the data sets, check them against the config, and build the runner.

    Args:
        cfg: the final config; changed in place.
        training: False writes no checkpoints.
        real_labels: ReaL's label file, or ``"timm"`` for timm's copy.

    Raises:
        ConfigError: the data is missing, less than a batch, or its classes differ from the
            config's, or the model cannot be built.
    """
    with waiting("listing the photos"):
        train, val = (DATASETS.build(cfg[loader].dataset) for loader in LOADERS)
    if train.metainfo != val.metainfo:
        ours, theirs = (dataset.metainfo["classes"] for dataset in (train, val))
        odd = sorted(set(ours) ^ set(theirs))[:3]
        raise ConfigError(
            f"training has {len(ours)} classes, validation {len(theirs)}; only one of them has "
            f"{', '.join(odd)}"
        )
    batch = cfg.train_dataloader.batch_size * world_size(cfg.get("launcher"))
    dropped = training and cfg.train_dataloader.get("drop_last")
    if dropped and not isinstance(train, ImageStream) and len(train) < batch:
        raise ConfigError(
            f"{len(train)} photos to train on are less than a batch of {batch} over all processes: "
            "a smaller --batch-size is needed"
        )
    if cfg.get("sync_bn") and not torch.cuda.is_available():
        print_log("no CUDA: SyncBN falls back to BN", logger="current")
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
    # Reuse the data sets: listing a million files takes long.
    runner._train_dataloader = _loader(cfg.train_dataloader, train)
    runner._val_dataloader = _loader(cfg.val_dataloader, val)
    if real_labels:
        filenames = [val.filename(index) for index in range(len(val))]
        runner._val_evaluator = dict(cfg.val_evaluator, filenames=filenames)
    return runner


def evaluate(runner: Runner, checkpoint: str) -> dict[str, float]:
    """Validate a checkpoint with any supported key layout and return the metrics.

    A file of ``tools/export.py`` takes the network's place.

    Raises:
        CheckpointError: the checkpoint cannot be read, does not fit or lacks the classifier.
        ExportError: the file cannot be read, is of another task, or has other classes.
    """
    model = runner.model.module if runner.distributed else runner.model
    network, classes = model.network, runner.cfg.model.classes
    if is_exported(checkpoint):
        from dense.export.evaluation import logits_of, read_for
        from dense.pretraining.predictor import readable

        model.use(logits_of(read_for("classification", checkpoint, readable(classes))))
        return runner.val()
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
    # mmengine deep-copies configs, which a stream does not survive; it needs no sampler either.
    left_out = ("dataset", "sampler", "collate_fn")
    return DataLoader(dataset, **{k: v for k, v in cfg.items() if k not in left_out})
