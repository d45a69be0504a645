"""Convert the backbone in a checkpoint to the state dict names of another code base.

    python tools/convert_checkpoint.py work_dirs/pretrain/best.pth swin_t.pth --to torchvision
    python tools/convert_checkpoint.py model_final.pkl safe.safetensors --to ours --trust

The source is a .pth, a .safetensors or a URL of a backbone, classifier, detector or segmentor: of
this package, of the paper's authors, or a Swin of its authors, timm, torchvision, MMSegmentation,
MMDetection or Detectron2. Converting back gives the same bits.
"""

import argparse
import sys
from pathlib import Path

from dense.waiting import waiting

with waiting("importing PyTorch"):
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
    add("--to", required=True, choices=list(LAYOUTS), help="layout to write, see below")
    add("--prefix", default="", help='prefix of every written name, such as "backbone."')
    add("--from-prefix", help="prefix of the backbone in the source, if it has several backbones")
    add(
        "--trust",
        action="store_true",
        help="load with weights_only=False, for files that hold more than weights, such as "
        "Detectron2's .pkl: the file can run any code",
    )
    add("--overwrite", action="store_true", help="replace a target that exists")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    if Path(args.target).exists() and not args.overwrite:
        print(f"convert_checkpoint: {args.target} exists; --overwrite replaces it", file=sys.stderr)
        return 2
    try:
        with waiting(f"converting {args.source}"):
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
