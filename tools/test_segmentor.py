"""Evaluate a trained segmentor: IoU of each class, mIoU and accuracy.

    python tools/test_segmentor.py work_dirs/mine/i_d_dw_conv_nano_upernet.py \\
        work_dirs/mine/iter_600.pth

The config that training saved in the work folder includes the paths of your own data.
"""

import argparse
import sys
from pathlib import Path

from dense.waiting import waiting

with waiting("importing MMEngine"):
    from mmengine.config import DictAction


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("config", help="the config of the training")
    add("checkpoint", help="a checkpoint of the training, or what tools/export.py made of one")
    add("--work-dir", help="logs and results (default: test/ beside the checkpoint)")
    add("--tta", action="store_true", help="average over six sizes of a photo and their mirrors")
    add("--out", help="output folder of the predicted label maps, as PNG")
    add("--show-dir", help="output folder of pictures of predictions and ground truth")
    launchers = "none", "pytorch", "slurm", "mpi"
    add("--launcher", choices=launchers, default="none", help="what started the processes (none)")
    add("--data-root", help="folder of the data set (default: the config's data_root)")
    add("--test-images", help="folder of other images than the training was given to test on")
    add("--test-masks", help="folder of their masks")
    add("--cfg-options", nargs="+", action=DictAction, metavar="KEY=VALUE", help="config changes")
    add("--local-rank", "--local_rank", type=int, default=0, help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def main() -> None:
    args = parse_args()

    from dense import require

    try:
        require("mmseg", "segmentation")
        with waiting("importing PyTorch and MMSegmentation"):
            from backbones import CheckpointError
            from dense.export.files import ExportError, is_exported
            from dense.openmmlab.config import require_task
            from dense.segmentation import config
            from dense.segmentation.data import ConfigError
    except ImportError as error:
        sys.exit(f"test_segmentor: {error}")

    try:
        cfg = config.load_config(args.config, args.cfg_options)
        require_task(cfg, "segmentation", "model", "test_dataloader", "test_evaluator")
        cfg.launcher = args.launcher
        # Not the training's folder, whose config would be overwritten.
        cfg.work_dir = args.work_dir or str(Path(args.checkpoint).parent / "test")
        exported = is_exported(args.checkpoint)
        if exported and args.tta:
            raise ConfigError(f"--tta is for checkpoints, {args.checkpoint} is exported")
        cfg.load_from, cfg.resume = None if exported else args.checkpoint, False
        if args.data_root:
            config.set_data_root(cfg, args.data_root)
        if args.out:
            cfg.test_evaluator.output_dir = args.out
        if args.show_dir:
            cfg.default_hooks.visualization.update(draw=True, interval=1)
            cfg.visualizer.save_dir = args.show_dir
        config.use_own_data(cfg)
        config.set_test_data(cfg, args.test_images, args.test_masks)
        config.check(cfg, training=False)
        if args.tta:
            config.use_tta(cfg)
        runner = config.build_runner(cfg)
        if exported:
            config.use_exported(runner, args.checkpoint)
        runner.test()
    except (ConfigError, CheckpointError, ExportError, ImportError) as error:
        sys.exit(f"test_segmentor: {' '.join(str(error).split())}")


if __name__ == "__main__":
    main()
