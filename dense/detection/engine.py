"""Training and evaluation of a LazyConfig with Detectron2's engine, on GPUs or a CPU."""

import json
import logging
import multiprocessing
import os
import signal
from argparse import Namespace
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import cloudpickle
import torch
from detectron2.config import LazyConfig, instantiate
from detectron2.engine import TrainerBase, create_ddp_model, hooks, launch
from detectron2.evaluation import inference_on_dataset, print_csv_format
from detectron2.utils import comm
from detectron2.utils.collect_env import collect_env_info
from detectron2.utils.env import seed_all_rng
from detectron2.utils.events import EventStorage, EventWriter
from detectron2.utils.logger import setup_logger
from omegaconf import DictConfig, OmegaConf
from torch import nn
from torch.multiprocessing import ProcessRaisedException

from backbones import CheckpointError
from dense import files, journal
from dense.backbone import revert_sync_batchnorm
from dense.detection.announcing import Announce
from dense.detection.backbone import PyramidBackbone
from dense.detection.checkpoint import FINAL, WholeCheckpointer
from dense.detection.config import LazyConfigError
from dense.detection.hooks import (
    EarlyStop,
    KeepBest,
    StopOnSignal,
    StoppedEarly,
    ValidateOnResume,
    WriteMetrics,
    run_writers,
)
from dense.detection.resuming import SeedSteps, resumable
from dense.detection.trainer import build_trainer
from dense.detection.tta import check_tta, with_tta
from dense.export.files import ExportError, is_exported
from dense.images import TooManyUnreadable
from dense.runs import Stopped
from dense.waiting import waiting

_logger = logging.getLogger(__name__)


def start(cfg: DictConfig, args: Namespace) -> None:
    """Train or evaluate, in one process per GPU or in ``num_processes`` CPU processes.

    Args:
        cfg: a config after :func:`dense.detection.data.resolve_data`.
        args: the command line: ``num_gpus`` (None: one if there is one), ``num_processes``,
            ``num_machines``, ``machine_rank``, ``dist_url``, ``resume``, ``eval_only``, ``tta``,
            ``config_file``.

    Raises:
        LazyConfigError: too few GPUs, several machines without ``dist_url``, a batch that the
            processes cannot share, or evaluation without a checkpoint or an evaluator. Errors of
            :func:`train` in any process are raised too.
        Stopped: Ctrl-C or SIGTERM ended the training after a checkpoint.
    """
    check(cfg, args)
    processes = args.num_gpus or args.num_processes
    if processes > 1:
        # The processes that train write a checkpoint; this one waits for them.
        signal.signal(signal.SIGINT, lambda *_: None)
        signal.signal(signal.SIGTERM, _pass_on)
    try:
        # cloudpickle sends functions defined in a config file by value.
        launch(
            _run,
            processes,
            num_machines=args.num_machines,
            machine_rank=args.machine_rank,
            dist_url=args.dist_url,
            args=(cloudpickle.dumps((cfg, args)), processes),
        )
    except ProcessRaisedException as error:
        # The error is the text of the process's traceback.
        name, _, reason = str(error).strip().splitlines()[-1].partition(": ")
        kinds = CheckpointError, LazyConfigError, ExportError, FloatingPointError, TooManyUnreadable
        for kind in kinds:
            if name.rpartition(".")[2] == kind.__name__:
                raise kind(reason) from error
        if name.rpartition(".")[2] == _StoppedProcess.__name__:
            number, _, checkpoint = reason.partition(" ")
            raise Stopped(int(number), checkpoint) from None
        raise


def check(cfg: DictConfig, args: Namespace) -> None:
    """Check the command line against the config and the machine; raises what :func:`start` does."""
    processes = _processes(args)
    _check_batch(cfg, processes * args.num_machines, args.eval_only)
    if args.eval_only and not cfg.train.init_checkpoint:
        raise LazyConfigError("--eval-only needs a checkpoint: train.init_checkpoint=PATH")
    if args.eval_only and "evaluator" not in cfg.dataloader:
        raise LazyConfigError("--eval-only needs dataloader.evaluator, which the config lacks")
    if args.tta:
        check_tta(cfg, args.eval_only)
    if args.tta and is_exported(cfg.train.init_checkpoint):
        raise LazyConfigError(f"--tta is for checkpoints, {cfg.train.init_checkpoint} is exported")
    if args.early_stop and not args.eval_only:
        _check_evaluations(cfg)
    if args.num_machines > 1 and args.dist_url == "auto":
        raise LazyConfigError(
            "several machines need --dist-url, such as tcp://<first machine>:29500"
        )


def train(
    cfg: DictConfig,
    *,
    resume: bool,
    early_stop: int | None = None,
    on_ready: Callable[[], None] | None = None,
    config_file: str | None = None,
) -> None:
    """Train a config; ``resume`` continues from the newest intact checkpoint if there is one.

    ``early_stop`` ends it when the box AP has not risen in so many evaluations.

    On a CPU a resumed run equals an uninterrupted one bit for bit: data order, augmentation and
    dropout follow from the run's seed, which checkpoints store.

    Raises:
        CheckpointError: the initial weights cannot be read or do not fit.
        LazyConfigError: the checkpoint to resume from has other classes.
        FloatingPointError: a loss is NaN or infinite; raised in every process.
    """
    model = _built(cfg)
    cfg.optimizer.params.model = model
    optimizer = instantiate(cfg.optimizer)
    classes = _classes(cfg)
    seed = cfg.train.seed if cfg.train.get("seed", -1) >= 0 else comm.shared_random_seed()
    checkpointer = WholeCheckpointer(model, cfg.train.output_dir, classes=classes, seed=seed)
    with waiting(f"reading the checkpoints in {cfg.train.output_dir}"):
        last = checkpointer.last_whole() if resume else None
    if last is None:
        if resume:
            _logger.info(f"no checkpoint in {cfg.train.output_dir}: training from scratch")
        _start_fresh(cfg, model, checkpointer)

    ddp = dict(cfg.train.ddp)
    if cfg.train.device == "cpu":
        ddp["device_ids"] = None
    parallel = create_ddp_model(model, **ddp)
    with waiting("reading the training data"):
        loader = instantiate(cfg.dataloader.train)
    trainer = build_trainer(cfg, parallel, loader, optimizer)
    checkpointer.add_checkpointable("trainer", trainer)
    is_main = comm.is_main_process()
    folder, period = cfg.train.output_dir, cfg.train.log_period
    writers = run_writers(folder, cfg.train.max_iter) if is_main else []
    evaluation = hooks.EvalHook(cfg.train.eval_period, lambda: evaluate(cfg, parallel))
    best = None
    if is_main and "evaluator" in cfg.dataloader:
        best = KeepBest(cfg.train.eval_period, checkpointer)
    trainer.register_hooks(
        [
            hooks.IterationTimer(),
            hooks.LRScheduler(scheduler=instantiate(cfg.lr_multiplier)),
            # Before the checkpoint: a kill after it must not lose the metrics of its iterations.
            WriteMetrics(writers, period) if is_main else None,
            hooks.PeriodicCheckpointer(checkpointer, **cfg.train.checkpointer) if is_main else None,
            evaluation,
            best,
            hooks.PeriodicWriter(writers, period=period) if is_main else None,
            StopOnSignal(checkpointer),
        ]
    )
    validation = ValidateOnResume(evaluation, folder, best)
    first = 0
    if last is not None:
        extra = checkpointer.resume(last)
        _same_classes(extra, classes, last)
        checkpointer.seed = extra.get("seed", seed)
        first = trainer.iter + 1
    if on_ready:
        on_ready()
    if first >= cfg.train.max_iter:
        _logger.info(f"{last} has all iterations (train.max_iter={cfg.train.max_iter})")
        # A kill may have come between the last iteration and what follows it.
        if Path(last).stem != FINAL and is_main:
            checkpointer.copy(last, FINAL)
        if not _validated_at_last(trainer, first, validation, best, writers):
            evaluate(cfg, parallel)
        if is_main:
            journal.end(folder)
        return
    announce = [Announce(cfg, last, config_file)] if is_main else []
    trainer.register_hooks([*announce, SeedSteps(checkpointer.seed), validation])
    trainer.data_loader = resumable(trainer.data_loader, checkpointer.seed, first)
    if early_stop:
        # After the evaluation that a kill cut off.
        trainer.register_hooks([EarlyStop(early_stop, cfg.train.eval_period, folder)])
    try:
        trainer.train(first, cfg.train.max_iter)
    except StoppedEarly as stopped:
        _logger.info(str(stopped))
        checkpointer.save(FINAL, iteration=trainer.iter)
    if is_main:
        journal.end(folder)


def _validated_at_last(
    trainer: TrainerBase,
    done: int,
    validation: ValidateOnResume,
    best: KeepBest | None,
    writers: list[EventWriter],
) -> bool:
    """Run the validation that follows the last iteration if a kill cut it off; whether it did."""
    trainer.register_hooks([validation])
    with EventStorage(done) as trainer.storage:
        trainer.start_iter, trainer.iter, trainer.max_iter = done, done - 1, done
        if best:
            best.before_train()
        # Detectron2 counts the evaluation at the end as one iteration later.
        late = validation.validate(done)
        for writer in writers if late else []:
            writer.write()
    return late


def evaluate(cfg: DictConfig, model: nn.Module | Callable[[list[dict]], list[dict]]) -> dict | None:
    """Evaluate on ``cfg.dataloader.test``, print the results and write them to ``results.json``.

    Returns:
        Detectron2's ``{"bbox": {"AP": ..}, "segm": {..}}`` in percent, empty outside the main
        process; None if the config has no evaluator.
    """
    if "evaluator" not in cfg.dataloader:
        return None
    # Before the evaluator: building the loader may register the data set.
    loader = instantiate(cfg.dataloader.test)
    results = inference_on_dataset(model, loader, instantiate(cfg.dataloader.evaluator))
    if comm.is_main_process():
        print_csv_format(results)
        files.write(Path(cfg.train.output_dir, "results.json"), json.dumps(results, indent=1))
    return results


def _run(pickled: bytes, processes: int) -> None:
    """Run one process of a training or evaluation."""
    cfg, args = cloudpickle.loads(pickled)
    _set_up(cfg, args)
    as_given = deepcopy(cfg)
    _fall_back(cfg, processes)
    if not args.eval_only:
        try:
            # An earlier run's config stays until its checkpoint has been found to fit.
            train(
                cfg,
                resume=args.resume,
                early_stop=args.early_stop,
                on_ready=lambda: _save_config(as_given),
                config_file=args.config_file,
            )
        except Stopped as stopped:
            if processes == 1:
                raise
            raise _StoppedProcess(f"{stopped.number} {stopped.checkpoint}") from None
        return
    if is_exported(cfg.train.init_checkpoint):
        evaluate(cfg, _exported(cfg))
        return
    model = _built(cfg)
    checkpointer = WholeCheckpointer(model)
    extra = checkpointer.load_weights(cfg.train.init_checkpoint, complete=True)
    _same_classes(extra, _classes(cfg), cfg.train.init_checkpoint)
    evaluate(cfg, with_tta(cfg, model) if args.tta else model)


def _exported(cfg: DictConfig) -> Callable[[list[dict]], list[dict]]:
    """A file of ``tools/export.py`` as the model."""
    from dense.export.evaluation import FileDetector, read_for

    return FileDetector(read_for("detection", cfg.train.init_checkpoint, _classes(cfg)))


def _built(cfg: DictConfig) -> nn.Module:
    """The model on its device.

    Raises:
        LazyConfigError: the config describes none.
    """
    try:
        with waiting("building the model"):
            model = instantiate(cfg.model)
    except (AssertionError, KeyError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise LazyConfigError(f"model: {reason}") from error
    return revert_sync_batchnorm(model).to(cfg.train.device)


class _StoppedProcess(Exception):
    """:class:`Stopped` in one of several processes; the message has the signal and the file."""


def _pass_on(number: int, frame: Any) -> None:
    for child in multiprocessing.active_children():
        os.kill(child.pid, number)


def _set_up(cfg: DictConfig, args: Namespace) -> None:
    """Detectron2's ``default_setup``, which would also write the config over an earlier run's."""
    folder, rank = cfg.train.output_dir, comm.get_rank()
    Path(folder).mkdir(parents=True, exist_ok=True)
    for name in ("fvcore", "detectron2", "dense", "backbones"):
        logger = setup_logger(folder, distributed_rank=rank, name=name)
    logger.info(f"Rank of current process: {rank}. World size: {comm.get_world_size()}")
    logger.info(f"environment:\n{collect_env_info()}")
    logger.info(f"command line: {args}")
    seed = cfg.train.get("seed", -1)
    seed_all_rng(None if seed < 0 else seed + rank)
    if not args.eval_only:
        torch.backends.cudnn.benchmark = cfg.train.get("cudnn_benchmark", False)


def _save_config(cfg: DictConfig) -> None:
    """Write ``config.yaml`` atomically."""
    if comm.is_main_process():
        path = Path(cfg.train.output_dir, "config.yaml")
        files.write(path, lambda partial: LazyConfig.save(cfg, str(partial)))
        _logger.info(f"config: {path}")


def _check_evaluations(cfg: DictConfig) -> None:
    data = cfg.get("data") or {}
    if not cfg.train.eval_period > 0:
        raise LazyConfigError("--early-stop needs evaluations: train.eval_period=N, N above 0")
    if "evaluator" not in cfg.dataloader or (data.get("train_json") and not data.get("val_json")):
        raise LazyConfigError("--early-stop needs evaluations: validation data, --val-json")


def _check_batch(cfg: DictConfig, processes: int, eval_only: bool) -> None:
    batch = OmegaConf.select(cfg, "dataloader.train.total_batch_size")
    if batch and batch % processes and not eval_only:
        raise LazyConfigError(
            f"dataloader.train.total_batch_size={batch} cannot be shared by {processes} processes: "
            "a multiple of their number is needed"
        )


def _processes(args: Namespace) -> int:
    available = torch.cuda.device_count()
    for name, least in (("num_gpus", 0), ("num_processes", 1), ("num_machines", 1)):
        value = getattr(args, name)
        if value is not None and value < least:
            option = name.replace("_", "-")
            raise LazyConfigError(f"--{option} {value}: {least} or more is needed")
    if not 0 <= args.machine_rank < args.num_machines:
        raise LazyConfigError(
            f"--machine-rank {args.machine_rank}: with --num-machines {args.num_machines} it is "
            f"{'0' if args.num_machines == 1 else f'0 to {args.num_machines - 1}'}"
        )
    if args.num_gpus is None:
        args.num_gpus = min(1, available)
    if args.num_gpus > available:
        raise LazyConfigError(
            f"--num-gpus {args.num_gpus}, but there are {available}; "
            "--num-gpus 0 trains on the CPU, in --num-processes processes"
        )
    if args.num_gpus and args.num_processes > 1:
        raise LazyConfigError(
            "--num-processes is for the CPU: on GPUs there is one process per GPU"
        )
    return args.num_gpus or args.num_processes


def _fall_back(cfg: DictConfig, processes: int) -> None:
    """Without CUDA, select the CPU and float32, and share the cores among the processes."""
    if torch.cuda.is_available():
        return
    changes = []
    if cfg.train.device != "cpu":
        changes.append(f"train.device {cfg.train.device} becomes cpu")
        cfg.train.device = "cpu"
    if cfg.train.amp.enabled:
        changes.append("AMP falls back to float32")
        cfg.train.amp.enabled = False
    if changes and comm.is_main_process():
        _logger.warning(f"no CUDA: {', '.join(changes)}")
    if processes > 1 and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // processes))


def _start_fresh(cfg: DictConfig, model: nn.Module, checkpointer: WholeCheckpointer) -> None:
    if cfg.train.init_checkpoint:
        checkpointer.load_weights(cfg.train.init_checkpoint, complete=False)
        return
    for module in model.modules():
        if isinstance(module, PyramidBackbone):
            module.init_weights()


def _classes(cfg: DictConfig) -> list[str] | None:
    return list(OmegaConf.select(cfg, "dataloader.metadata.classes") or []) or None


def _same_classes(checkpoint: dict, classes: list[str] | None, path: str) -> None:
    trained = checkpoint.get("classes")
    if trained and classes and trained != classes:
        raise LazyConfigError(
            f"{path} has the classes {','.join(trained)}, the data {','.join(classes)}: "
            f"--classes {','.join(trained)} puts the data's in that order"
        )
