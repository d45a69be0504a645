"""Train a segmentor on ADE20K or on your own images and masks.

On your own data, on a CPU or one GPU:
    python tools/train_segmentor.py configs/segmentation/i_d_dw_conv_nano_upernet.py \\
        --train-images images/train --train-masks masks/train \\
        --val-images images/val --val-masks masks/val --classes background,road,tree

On ADE20K, which lies in data/ade/ADEChallengeData2016, with 8 GPUs:
    torchrun --nproc_per_node 8 tools/train_segmentor.py --launcher pytorch --amp \\
        configs/segmentation/i_d_dw_conv_tiny_upernet_8xb2-160k_ade20k-512x512.py

The same command with --resume goes on after a kill; --cfg-options key=value changes the config.
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
    add("config", help="a config of MMSegmentation")
    add(
        "--work-dir", help="log, TensorBoard, checkpoints (default: work_dirs/<name of the config>)"
    )
    add("--resume", action="store_true", help="go on from the work folder's last whole checkpoint")
    add("--amp", action="store_true", help="mixed precision; float32 where there is no CUDA")
    add("--launcher", choices=("none", "pytorch", "slurm", "mpi"), default="none")
    add("--data-root", help="the data set's folder, if not the config's data_root")
    add("--train-images", help="a folder of images to train on")
    add("--train-masks", help="the folder of their masks: PNG of the same name, class indices")
    add("--val-images", help="a folder of images to evaluate on")
    add("--val-masks", help="the folder of their masks")
    add("--classes", help="comma-separated names, in the order of the indices in the masks")
    add("--ignore-index", type=int, help="a value in the masks that counts nowhere; 255 never does")
    add("--reduce-zero-label", action="store_true", help="0 counts nowhere, classes begin at 1")
    add("--cfg-options", nargs="+", action=DictAction, metavar="KEY=VALUE", help="config changes")
    # What torch.distributed.launch still passes.
    add("--local-rank", "--local_rank", type=int, default=0, help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def main() -> None:
    """Check everything that can be checked, then train."""
    args = parse_args()

    from dense import require

    try:
        require("mmseg", "segmentation")
        from backbones import CheckpointError
        from dense.metrics import plot_finished
        from dense.openmmlab.config import ConfigError
        from dense.segmentation import config
    except ImportError as error:
        sys.exit(f"train_segmentor: {error}")

    own_data = {
        key: getattr(args, key)
        for key in (
            *("train_images", "train_masks", "val_images", "val_masks"),
            *("classes", "ignore_index", "reduce_zero_label"),
        )
    }
    try:
        cfg = config.load_config(args.config, args.cfg_options)
        cfg.launcher = args.launcher
        cfg.work_dir = (
            args.work_dir or cfg.get("work_dir") or str(Path("work_dirs", Path(args.config).stem))
        )
        cfg.resume = args.resume or cfg.get("resume", False)
        if args.data_root:
            config.set_data_root(cfg, args.data_root)
        if args.amp:
            config.use_amp(cfg)
        config.use_own_data(cfg, own_data)
        config.check(cfg, training=True)
        runner = config.build_runner(cfg)
        runner.train()
        if runner.rank == 0:
            plot_finished(runner.work_dir)
    except (ConfigError, CheckpointError, FloatingPointError) as error:
        sys.exit(f"train_segmentor: {error}")


if __name__ == "__main__":
    main()
