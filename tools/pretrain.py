"""Train a classifier on ImageNet-1K, ImageNet-22K or your own folders of images.

ImageNet-1K with 8 GPUs; the data root has train/ and val/, each with a folder for every class:
    torchrun --nproc_per_node 8 tools/pretrain.py --launcher pytorch --amp \\
        configs/pretraining/d_dw_conv_tiny_8xb128-300e_in1k-224x224.py --data-root data/imagenet

Your own folders, on a CPU or one GPU:
    python tools/pretrain.py configs/pretraining/i_d_dw_conv_nano.py \\
        --data-root photos --num-classes 10

A row of the paper's ablations (backbones/README.md lists them), in the size of the config's:
    python tools/pretrain.py configs/pretraining/dw_conv_nano.py --ablation dw_conv_se \\
        --data-root photos --num-classes 10

On fewer GPUs gradients are accumulated to keep the recipe's total batch size. --resume continues
after a kill. --eval-only CHECKPOINT evaluates a checkpoint of any supported layout: top-1, top-5,
images per second, and accuracy per class in WORK_DIR/evaluation.
"""

import argparse
import sys
from pathlib import Path

from dense.waiting import waiting

with waiting("importing MMEngine"):
    from mmengine.config import Config, DictAction

from dense.options import add_run_options


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("config", help="a config of configs/pretraining")
    add("--work-dir", help="logs and checkpoints (default: work_dirs/<name of the config>)")
    add("--data-root", help="folder of train/ and val/ (default: the config's)")
    add("--train", help="training images: a folder, a .tar, or a folder of .tar (DATA_ROOT/train)")
    add("--val", help="validation images, in the same forms (DATA_ROOT/val)")
    add("--num-classes", type=int, help="number of classes (default: the config's)")
    add("--batch-size", type=int, help="batch size per process (default: the config's)")
    add("--accumulate", type=int, help="batches per optimizer step; default keeps the total batch")
    add("--init", help="initial weights: a file, a URL or a tag")
    add("--ablation", metavar="NAME", help="a row of the paper's ablations in place of the network")
    add_run_options(add, "epochs", "work dir")
    add("--amp", action="store_true", help="bfloat16 where the device has it, else float16")
    add("--compile", action="store_true", help="torch.compile the network")
    add(
        "--grad-checkpointing", action="store_true", help="less memory, more time: recompute blocks"
    )
    add("--sync-bn", action="store_true", help="SyncBN: batch statistics over all GPUs")
    add("--ema", type=float, nargs="?", const=0.9999, metavar="DECAY", help="average the weights")
    add(
        "--anneal-after-warmup",
        action="store_true",
        help="start the cosine after warm-up, as Swin since 2022-10 (default: at step 0)",
    )
    add(
        "--eval-only",
        metavar="CHECKPOINT",
        help="evaluate a checkpoint or a file of tools/export.py, do not train",
    )
    add(
        "--real-labels",
        nargs="?",
        const="timm",
        metavar="FILE",
        help="also report accuracy on ImageNet-ReaL labels: FILE (real.json), or timm's copy",
    )
    launchers = "none", "pytorch", "slurm", "mpi"
    add("--launcher", choices=launchers, default="none", help="what started the processes (none)")
    add("--cfg-options", nargs="+", action=DictAction, metavar="KEY=VALUE", help="config changes")
    # torch.distributed.launch still passes it.
    add("--local-rank", "--local_rank", type=int, default=0, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    for name in ("num_classes", "batch_size", "accumulate"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} {getattr(args, name)}: 1 or more is needed")
    for name in ("resume", "overwrite", "epochs", "early_stop"):
        if args.eval_only and getattr(args, name):
            option = name.replace("_", "-")
            parser.error(f"--{option} is for training, but --eval-only does not train")
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)

    from dense import require, runs

    try:
        require("mmengine", "pretraining")
        with waiting("importing PyTorch and timm"):
            from backbones import CheckpointError
            from dense.export.files import ExportError
            from dense.openmmlab.config import ConfigError
            from dense.pretraining.data import TooManyUnreadable
    except ImportError as error:
        sys.exit(f"pretrain: {error}")
    foreseen = (ConfigError, CheckpointError, ExportError, ImportError)
    foreseen += (FloatingPointError, TooManyUnreadable)
    runs.run_tool("pretrain", lambda: train(args), *foreseen)


def configured(args: argparse.Namespace) -> Config:
    """The config of a command line, with its data sets; batches are planned in :func:`train`."""
    from dense.openmmlab.config import (
        load_config,
        require_task,
        set_length,
        use_ablation,
        use_amp,
        use_early_stop,
    )
    from dense.pretraining import config

    cfg = load_config(args.config, args.cfg_options)
    loaders = ("train_dataloader", "val_dataloader")
    require_task(cfg, "classification", "model", "train_cfg", "optim_wrapper", *loaders)
    cfg.launcher = args.launcher
    run = Path(args.config).stem
    if args.ablation:
        use_ablation(cfg.model, args.ablation, "name", dense=False)
        run += f"_{args.ablation}"
    cfg.work_dir = args.work_dir or cfg.get("work_dir") or str(Path("work_dirs", run))
    cfg.resume = args.resume or cfg.get("resume", False)
    config.set_data(cfg, args.data_root, args.train, args.val, args.num_classes)
    if args.init or args.eval_only:
        cfg.model.init = None if args.eval_only else args.init
    if args.amp:
        use_amp(cfg)
    if args.compile:
        cfg.model.compile = True
    if args.grad_checkpointing:
        cfg.model.grad_checkpointing = True
    if args.epochs:
        set_length(cfg, "epochs", args.epochs)
    if args.early_stop:
        use_early_stop(cfg, args.early_stop)
    if args.sync_bn:
        cfg.sync_bn = "torch"
    if args.ema is not None:
        config.use_ema(cfg, args.ema)
    if args.anneal_after_warmup:
        config.anneal_after_warmup(cfg)
    return cfg


def train(args: argparse.Namespace) -> None:
    """Check the config and the data, then train, or evaluate with ``--eval-only``."""
    from dense import runs
    from dense.metrics import plot_finished
    from dense.pretraining import config
    from dense.run_report import write_finished

    cfg = configured(args)
    world = config.world_size(args.launcher)
    batches = config.plan_batches(cfg, world, args.batch_size, args.accumulate)
    if args.eval_only:
        runner = config.build(cfg, False, args.real_labels)
        metrics = config.evaluate(runner, args.eval_only)
        print(", ".join(f"{name} {value:.2f}" for name, value in metrics.items()))
        return
    with runs.claimed(
        cfg.work_dir, resume=cfg.resume, overwrite=args.overwrite, launcher=args.launcher
    ) as start:
        start()
        runner = config.build(cfg, True, args.real_labels)
        runner.logger.info(batches)
        runner.train()
        if runner.rank == 0:
            plot_finished(runner.work_dir)
            write_finished(runner.work_dir)


if __name__ == "__main__":
    main()
