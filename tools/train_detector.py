"""Train or evaluate a detector on COCO or on your own COCO-style data.

On your own data, on a CPU or one GPU:
    python tools/train_detector.py --output-dir work/mine \\
        --config-file configs/detection/cascade_mask_rcnn_dw_conv_nano.py \\
        --train-json train.json --train-images train/ --val-json val.json --val-images val/

On COCO in $DETECTRON2_DATASETS/coco, with 8 GPUs:
    python tools/train_detector.py --num-gpus 8 --output-dir work/dw_tiny \\
        --config-file configs/detection/cascade_mask_rcnn_dw_conv_tiny_3x_coco.py

--resume continues after a kill or Ctrl-C; key=value arguments change the config.
"""

import argparse
import os
from typing import TYPE_CHECKING

from dense.options import add_run_options, listed_classes
from dense.waiting import waiting

if TYPE_CHECKING:
    from omegaconf import DictConfig


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--config-file", required=True, help="a LazyConfig .py, or an earlier run's config.yaml")
    add(
        "--ablation", metavar="NAME", help="a row of the paper's ablations in place of the backbone"
    )
    add("--output-dir", help="logs and checkpoints (default: the config's train.output_dir)")
    add("--train-json", help="COCO-style annotations for training")
    add("--train-images", help="folder of the training images")
    add("--val-json", help="COCO-style annotations for evaluation")
    add("--val-images", help="folder of the evaluation images")
    add("--test-json", help="COCO-style annotations that --eval-only evaluates on (VAL_JSON)")
    add("--test-images", help="folder of their images")
    add("--allow-invalid", action="store_true", help="drop images and objects that are faulty")
    add("--classes", help="comma-separated category names, or a file of them (default: all)")
    add_run_options(add, "iters", "output dir")
    add("--eval-only", action="store_true", help="evaluate train.init_checkpoint=PATH and stop")
    add("--tta", action="store_true", help="with --eval-only: average over sizes and mirrors")
    add("--num-gpus", type=int, help="GPUs per machine; 0 is the CPU (default: 1 if there is one)")
    add("--num-processes", type=int, default=1, help="processes per machine on CPUs")
    add("--num-machines", type=int, default=1, help="that train together (1)")
    add("--machine-rank", type=int, default=0, help="0 on the first machine")
    add("--dist-url", default="auto", help="tcp://<first machine>:<port>, with several machines")
    add("overrides", nargs="*", metavar="key=value", help="changes to the config")
    args = parser.parse_intermixed_args(argv)
    for name in ("iters", "early_stop"):
        if args.eval_only and getattr(args, name):
            parser.error(f"--{name.replace('_', '-')} is for training, but --eval-only has none")
    return args


def main() -> None:
    args = parse_args()
    if args.num_gpus == 0:
        # Hide the GPUs, before CUDA is initialised.
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    with waiting("importing PyTorch and Detectron2"):
        from backbones import CheckpointError
        from dense import runs
        from dense.detection import engine as engine
        from dense.detection.config import LazyConfigError
        from dense.export.files import ExportError
        from dense.images import TooManyUnreadable

    foreseen = (LazyConfigError, CheckpointError, ExportError, ImportError)
    foreseen += (FloatingPointError, TooManyUnreadable)
    runs.run_tool("train_detector", lambda: run(args), *foreseen)


def configured(args: argparse.Namespace) -> "DictConfig":
    """The config of a command line; ``resolve_data`` puts its data sets into the loaders."""
    from dense.detection.config import LazyConfigError, load_config, set_length, use_ablation

    cfg = load_config(args.config_file, args.overrides)
    if args.ablation:
        use_ablation(cfg, args.ablation)
    if args.iters:
        set_length(cfg, args.iters)
    if args.output_dir:
        cfg.train.output_dir = args.output_dir
    try:
        classes = None if args.classes is None else listed_classes(args.classes)[0]
    except ValueError as error:
        raise LazyConfigError(f"--classes: {error}") from error
    if classes is not None and not all(classes):
        raise LazyConfigError(f"--classes {args.classes!r}: a name is empty")
    given = {
        "train_json": args.train_json,
        "train_images": args.train_images,
        "val_json": args.val_json,
        "val_images": args.val_images,
        "test_json": args.test_json,
        "test_images": args.test_images,
        "classes": classes,
        "allow_invalid": args.allow_invalid,
    }
    cfg.data = {**(cfg.get("data") or {}), **{k: v for k, v in given.items() if v}}
    return cfg


def run(args: argparse.Namespace) -> None:
    """Check the config and the data, then train, or evaluate with ``--eval-only``."""
    from dense import runs
    from dense.detection import engine
    from dense.detection.data import resolve_data
    from dense.metrics import plot_finished
    from dense.run_report import write_finished

    cfg = configured(args)
    if args.eval_only:
        with waiting("reading the annotations"):
            resolve_data(cfg, training=False)
        engine.start(cfg, args)
        return
    engine.check(cfg, args)
    with runs.claimed(
        cfg.train.output_dir,
        resume=args.resume,
        overwrite=args.overwrite,
        first=args.machine_rank == 0,
    ) as start:
        with waiting("reading the annotations"):
            resolve_data(cfg, training=True)
        start()
        engine.start(cfg, args)
        if args.machine_rank == 0:
            plot_finished(cfg.train.output_dir)
            write_finished(cfg.train.output_dir)


if __name__ == "__main__":
    main()
