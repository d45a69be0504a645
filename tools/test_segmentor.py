"""Evaluate a trained segmentor: IoU of every class and their mean.

    python tools/test_segmentor.py work_dirs/mine/i_d_dw_conv_nano_upernet.py \\
        work_dirs/mine/iter_600.pth

The config in a work folder holds everything that a run was given, your own data too.
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
    add("config", help="the config that the segmentor was trained with")
    add("checkpoint", help="the file that training wrote")
    add("--work-dir", help="log and figures (default: test/ beside the checkpoint)")
    add("--out", help="a folder for the predicted label maps, as PNG")
    add("--show-dir", help="a folder for pictures of prediction and truth")
    add("--launcher", choices=("none", "pytorch", "slurm", "mpi"), default="none")
    add("--data-root", help="the data set's folder, if not the config's data_root")
    add("--cfg-options", nargs="+", action=DictAction, metavar="KEY=VALUE", help="config changes")
    add("--local-rank", "--local_rank", type=int, default=0, help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def main() -> None:
    """Check everything that can be checked, then evaluate."""
    args = parse_args()

    from dense import require

    try:
        require("mmseg", "segmentation")
        from backbones import CheckpointError
        from dense.segmentation import config
        from dense.segmentation.data import ConfigError
    except ImportError as error:
        sys.exit(f"test_segmentor: {error}")

    try:
        cfg = config.load_config(args.config, args.cfg_options)
        cfg.launcher = args.launcher
        # Not the training's own folder: its config would be overwritten by this one.
        cfg.work_dir = args.work_dir or str(Path(args.checkpoint).parent / "test")
        cfg.load_from, cfg.resume = args.checkpoint, False
        if args.data_root:
            config.set_data_root(cfg, args.data_root)
        if args.out:
            cfg.test_evaluator.output_dir = args.out
        if args.show_dir:
            cfg.default_hooks.visualization.update(draw=True, interval=1)
            cfg.visualizer.save_dir = args.show_dir
        config.use_own_data(cfg)
        config.check(cfg, training=False)
        config.build_runner(cfg).test()
    except (ConfigError, CheckpointError) as error:
        sys.exit(f"test_segmentor: {error}")


if __name__ == "__main__":
    main()
