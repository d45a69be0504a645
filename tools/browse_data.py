"""Show what a training would see, before any training: one HTML page.

    python tools/browse_data.py train_detector --out data.html \\
        --config-file configs/detection/cascade_mask_rcnn_dw_conv_nano.py \\
        --train-json train.json --train-images train/ --val-json val.json --val-images val/
    python tools/browse_data.py train_segmentor configs/segmentation/dw_conv_nano_upernet.py \\
        --train-images images/train --train-masks masks/train \\
        --val-images images/val --val-masks masks/val --classes background,road,tree
    python tools/browse_data.py pretrain configs/pretraining/dw_conv_nano.py \\
        --data-root photos --num-classes 10

After the name of a training tool stand that tool's own arguments, as the training will have them
(tools/TOOL.py --help lists them): config, data set and transforms are built as it builds them. The
page has augmented photos with boxes and masks, how often each class occurs, sizes, and files that
are unreadable or odd. Nothing is written but the page.
"""

import argparse
import sys
import tempfile
from importlib import import_module
from pathlib import Path

from dense.waiting import waiting

# The training tools, and the modules that show their data.
TOOLS = {
    "train_detector": "dense.detection",
    "train_segmentor": "dense.segmentation",
    "pretrain": "dense.pretraining",
}


def parse_args(argv: list[str] | None = None) -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        usage="browse_data.py [--out FILE] [--images N] [--check N] [--seed N] TOOL ...",
    )
    add = parser.add_argument
    add("--out", default="data.html", help="the page to write (%(default)s)")
    add("--images", type=int, default=24, metavar="N", help="samples to draw (%(default)s)")
    add(
        *("--check",),
        **dict(type=int, default=1000, metavar="N"),
        help="photos of each split to decode and masks to count, drawn at random (%(default)s)",
    )
    seeded = "which samples, and their augmentation (%(default)s)"
    add("--seed", type=int, default=0, metavar="N", help=seeded)
    add("tool", choices=TOOLS, metavar="TOOL", help=", ".join(TOOLS))
    args, rest = parser.parse_known_args(argv)
    with waiting("importing PyTorch"):
        from dense.browsing import MOST_SAMPLES

    if not 0 <= args.images <= MOST_SAMPLES:
        parser.error(f"--images {args.images}: 0 to {MOST_SAMPLES}, so that the page stays small")
    if args.check < 0:
        parser.error(f"--check {args.check}: 0 or more is needed")
    if Path(args.out).suffix != ".html":
        parser.error(f"--out {args.out}: a .html is needed")
    return args, rest


def browse(args: argparse.Namespace, rest: list[str]) -> None:
    """Build the data of the training and write the page."""
    from dense import browsing

    with waiting(f"importing {args.tool} and its framework"):
        sys.path.insert(0, str(Path(__file__).parent))
        tool = import_module(args.tool)
        provider = import_module(f"{TOOLS[args.tool]}.browsing")
    given = tool.parse_args(rest)
    with waiting("reading the config"):
        cfg = tool.configured(given)
    config = given.config_file if args.tool == "train_detector" else given.config
    with tempfile.TemporaryDirectory() as folder:
        if args.tool == "train_detector":
            # Own annotations with selected classes are rewritten into it.
            cfg.train.output_dir = folder
        splits, colours = provider.splits(cfg, args.images, args.check, args.seed)
    names = ", ".join(f"{split.total:,} {split.name} photos" for split in splits)
    browsing.write(
        args.out,
        f"Data of {Path(config).stem}",
        f"What {args.tool} sees with these arguments, before any training: {names}.",
        browsing.sections(splits, colours),
    )
    for split in splits:
        odd = len(split.odd) + len(browsing.oddities(split.photos))
        print(f"{split.name}: {split.total} photos, {odd} odd things")
    print(args.out)


def main(argv: list[str] | None = None) -> None:
    args, rest = parse_args(argv)
    from dense import require, runs

    package = {"train_detector": "detectron2", "train_segmentor": "mmseg", "pretrain": "mmengine"}
    try:
        require(package[args.tool], TOOLS[args.tool].rpartition(".")[2])
        with waiting(f"importing {package[args.tool]}"):
            from dense.images import TooManyUnreadable

            foreseen = [import_module(f"{TOOLS[args.tool]}.config").ConfigError, TooManyUnreadable]
    except ImportError as error:
        sys.exit(f"browse_data: {error}")
    runs.run_tool("browse_data", lambda: browse(args, rest), *foreseen)


if __name__ == "__main__":
    main()
