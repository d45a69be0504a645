"""Write a checkpoint's backbone by the names of another code base.

    python tools/convert_checkpoint.py work_dirs/pretrain/best.pth swin_t.pth --to torchvision
    python tools/convert_checkpoint.py model_final.pkl safe.safetensors --to ours --trust

Reads weights of this package, the authors' DW-Conv files, Swin's own, timm's, torchvision's,
MMSegmentation's, MMDetection's and Detectron2's Swin, from a .pth, a .safetensors or a URL, alone
or inside a classifier, detector or segmentor. Values are not changed: converting back gives the
same bits.
"""

import argparse
import sys
from pathlib import Path

from backbones import CheckpointError
from backbones.conversion import convert_checkpoint
from backbones.layouts import LAYOUTS


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    layouts = "\n".join(f"  {layout.name:12} {layout.description}" for layout in LAYOUTS.values())
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog=f"layouts:\n{layouts}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("source", help="file or URL")
    add("target", help=".pth or .safetensors to write")
    add("--to", required=True, choices=list(LAYOUTS), help="whose names to write")
    add("--prefix", default="", help='put before every name, "backbone." say')
    add("--from-prefix", help="what stands before the backbone's names, if there are several")
    add(
        "--trust",
        action="store_true",
        help="unpickle a file that holds more than weights, Detectron2's .pkl say: that runs code "
        "which the file names",
    )
    add("--overwrite", action="store_true", help="replace a target that exists")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    if Path(args.target).exists() and not args.overwrite:
        print(f"convert_checkpoint: {args.target} exists; --overwrite replaces it", file=sys.stderr)
        return 2
    try:
        done = convert_checkpoint(
            args.source,
            args.target,
            args.to,
            prefix=args.prefix,
            from_prefix=args.from_prefix,
            weights_only=not args.trust,
        )
    except (CheckpointError, ValueError, OSError) as error:
        print(f"convert_checkpoint: {error}", file=sys.stderr)
        return 2
    print(f"{args.source}: {done.family}, {done.source.name} layout")
    print(f"{args.target}: {len(done.written)} entries, {args.to} layout")
    if done.left_out:
        print(f"left out, which {args.to} has no place for: {', '.join(done.left_out)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
