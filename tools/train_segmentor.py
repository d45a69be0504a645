"""Train a segmentor on ADE20K or on your own images and masks.

On your own data, on a CPU or one GPU:
    python tools/train_segmentor.py configs/segmentation/i_d_dw_conv_nano_upernet.py \\
        --train-images images/train --train-masks masks/train \\
        --val-images images/val --val-masks masks/val --classes background,road,tree

On ADE20K in data/ade/ADEChallengeData2016, with 8 GPUs:
    torchrun --nproc_per_node 8 tools/train_segmentor.py --launcher pytorch --amp \\
        configs/segmentation/i_d_dw_conv_tiny_upernet_8xb2-160k_ade20k-512x512.py

--resume continues after a kill or Ctrl-C; --cfg-options key=value changes the config.
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
    add("config", help="a config of MMSegmentation")
    add(
        "--ablation", metavar="NAME", help="a row of the paper's ablations in place of the backbone"
    )
    add("--work-dir", help="logs and checkpoints (default: work_dirs/<name of the config>)")
    add_run_options(add, "iters", "work dir")
    add("--amp", action="store_true", help="bfloat16 where the device has it, else float16")
    launchers = "none", "pytorch", "slurm", "mpi"
    add("--launcher", choices=launchers, default="none", help="what started the processes (none)")
    add("--data-root", help="folder of the data set (default: the config's data_root)")
    add("--train-images", help="folder of the training images")
    add("--train-masks", help="folder of their masks: PNGs or TIFFs of the same names")
    add("--val-images", help="folder of the validation images")
    add("--val-masks", help="folder of their masks")
    add("--test-images", help="folder of images that test_segmentor.py tests on (VAL_IMAGES)")
    add("--test-masks", help="folder of their masks")
    add(
        "--classes",
        help="comma-separated class names, in the order of the indices in the masks; or a file: "
        "a name on each line, and its colour where masks are coloured: road 128 64 128",
    )
    add("--ignore-index", type=int, help="value of masks that is ignored, in addition to 255")
    add("--reduce-zero-label", action="store_true", help="ignore 0 in masks; classes begin at 1")
    add("--short-side", type=int, metavar="N", help="resize all photos to a short side of N")
    add("--cfg-options", nargs="+", action=DictAction, metavar="KEY=VALUE", help="config changes")
    # torch.distributed.launch still passes it.
    add("--local-rank", "--local_rank", type=int, default=0, help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def main() -> None:
    args = parse_args()

    from dense import require, runs

    try:
        require("mmseg", "segmentation")
        with waiting("importing PyTorch and MMSegmentation"):
            from backbones import CheckpointError
            from dense import segmentation as segmentation
            from dense.images import TooManyUnreadable
            from dense.openmmlab.config import ConfigError
    except ImportError as error:
        sys.exit(f"train_segmentor: {error}")
    foreseen = (ConfigError, CheckpointError, FloatingPointError, TooManyUnreadable)
    runs.run_tool("train_segmentor", lambda: train(args), *foreseen)


def configured(args: argparse.Namespace) -> Config:
    """The config of a command line, with its data sets; nothing is checked on disk yet."""
    from dense.openmmlab.config import require_task, set_length, use_ablation, use_early_stop
    from dense.segmentation import config

    own_data = {
        key: getattr(args, key)
        for key in (
            *("train_images", "train_masks", "val_images", "val_masks"),
            *("test_images", "test_masks"),
            *("classes", "ignore_index", "reduce_zero_label"),
        )
    }
    cfg = config.load_config(args.config, args.cfg_options)
    loaders = ("train_dataloader", "val_dataloader", "test_dataloader")
    require_task(cfg, "segmentation", "model", "train_cfg", "optim_wrapper", *loaders)
    cfg.launcher = args.launcher
    run = Path(args.config).stem
    if args.ablation:
        use_ablation(cfg.model.backbone, args.ablation, "type")
        run += f"_{args.ablation}"
    cfg.work_dir = args.work_dir or cfg.get("work_dir") or str(Path("work_dirs", run))
    cfg.resume = args.resume or cfg.get("resume", False)
    if args.data_root:
        config.set_data_root(cfg, args.data_root)
    if args.short_side is not None:
        config.set_short_side(cfg, args.short_side)
    if args.iters:
        set_length(cfg, "iters", args.iters)
    if args.early_stop:
        use_early_stop(cfg, args.early_stop)
    if args.amp:
        config.use_amp(cfg)
    config.use_own_data(cfg, own_data)
    return cfg


def train(args: argparse.Namespace) -> None:
    """Check the config and the data, then train."""
    from dense import runs
    from dense.metrics import plot_finished
    from dense.run_report import write_finished
    from dense.segmentation import config

    cfg = configured(args)
    config.check(cfg, training=True)
    with runs.claimed(
        cfg.work_dir, resume=cfg.resume, overwrite=args.overwrite, launcher=args.launcher
    ) as start:
        start()
        runner = config.build_runner(cfg)
        runner.train()
        if runner.rank == 0:
            plot_finished(runner.work_dir)
            write_finished(runner.work_dir)


if __name__ == "__main__":
    main()
