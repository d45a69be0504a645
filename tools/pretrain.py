"""Train a network on ImageNet-1K, ImageNet-22K or your own folders of images.

ImageNet-1K, with 8 GPUs; its folder has train/ and val/, and in them a folder for every class:
    torchrun --nproc_per_node 8 tools/pretrain.py --launcher pytorch --amp \\
        configs/pretraining/d_dw_conv_tiny_8xb128-300e_in1k-224x224.py --data-root data/imagenet

Your own folders, on a CPU or one GPU:
    python tools/pretrain.py configs/pretraining/i_d_dw_conv_nano.py \\
        --data-root photos --num-classes 10

On fewer GPUs gradients are accumulated, so that the recipe's total batch is kept. The same command
with --resume goes on after a kill. --eval-only CHECKPOINT measures a checkpoint, of whoever's
names: top-1, top-5, images per second, and per class in WORK_DIR/evaluation.
"""

import argparse
import sys
from pathlib import Path

from mmengine.config import DictAction


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("config", help="one of configs/pretraining")
    add(
        "--work-dir", help="log, TensorBoard, checkpoints (default: work_dirs/<name of the config>)"
    )
    add("--data-root", help="folder with train and val in it (config: data/imagenet)")
    add("--train", help="training images, if elsewhere: a folder, a .tar, a folder of .tar")
    add("--val", help="validation images, if elsewhere")
    add("--num-classes", type=int, help="classes of the data, if not the config's")
    add("--batch-size", type=int, help="images a process takes at a time, if not the config's")
    add("--accumulate", type=int, help="batches to a step; default: what the recipe's total needs")
    add("--init", help="start from these weights: a file, a URL, a tag")
    add("--resume", action="store_true", help="go on from the work folder's last whole checkpoint")
    add("--amp", action="store_true", help="bfloat16 where the device has it, else float16")
    add("--compile", action="store_true", help="torch.compile the network")
    add("--sync-bn", action="store_true", help="batch statistics of all GPUs")
    add("--ema", type=float, nargs="?", const=0.9999, metavar="DECAY", help="average the weights")
    add("--eval-only", metavar="CHECKPOINT", help="train nothing, measure this")
    add(
        "--real-labels",
        nargs="?",
        const="timm",
        metavar="FILE",
        help="adds the accuracy by ReaL's labels, of FILE (real.json) or of timm's copy",
    )
    add("--launcher", choices=("none", "pytorch", "slurm", "mpi"), default="none")
    add("--cfg-options", nargs="+", action=DictAction, metavar="KEY=VALUE", help="config changes")
    # What torch.distributed.launch still passes.
    add("--local-rank", "--local_rank", type=int, default=0, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    for name in ("num_classes", "batch_size", "accumulate"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} {getattr(args, name)}: 1 or more is needed")
    if args.eval_only and args.resume:
        parser.error("--eval-only trains nothing that --resume could go on with")
    return args


def main(argv: list[str] | None = None) -> None:
    """Check everything that can be checked, then train or measure."""
    args = parse_args(argv)

    from dense import require

    try:
        require("mmengine", "pretraining")
        from backbones import CheckpointError
        from dense.metrics import plot_finished
        from dense.openmmlab.config import ConfigError, best_half, load_config, use_amp
        from dense.pretraining import config
        from dense.pretraining.data import TooManyUnreadable
    except ImportError as error:
        sys.exit(f"pretrain: {error}")

    try:
        cfg = load_config(args.config, args.cfg_options)
        cfg.launcher = args.launcher
        cfg.work_dir = (
            args.work_dir or cfg.get("work_dir") or str(Path("work_dirs", Path(args.config).stem))
        )
        cfg.resume = args.resume or cfg.get("resume", False)
        config.set_data(cfg, args.data_root, args.train, args.val, args.num_classes)
        if args.init or args.eval_only:
            cfg.model.init = None if args.eval_only else args.init
        if args.amp:
            use_amp(cfg, best_half())
        if args.compile:
            cfg.model.compile = True
        if args.sync_bn:
            cfg.sync_bn = "torch"
        if args.ema is not None:
            config.use_ema(cfg, args.ema)
        world = config.world_size(args.launcher)
        batches = config.plan_batches(cfg, world, args.batch_size, args.accumulate)
        runner = config.build(cfg, not args.eval_only, args.real_labels)
        if args.eval_only:
            metrics = config.evaluate(runner, args.eval_only)
            print(", ".join(f"{name} {value:.2f}" for name, value in metrics.items()))
            return
        runner.logger.info(batches)
        runner.train()
        if runner.rank == 0:
            plot_finished(runner.work_dir)
    except (ConfigError, CheckpointError, FloatingPointError, TooManyUnreadable) as error:
        sys.exit(f"pretrain: {error}")


if __name__ == "__main__":
    main()
