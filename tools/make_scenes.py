"""Generate scenes of three kinds of shapes, with their truth, in COCO's and ADE20K's layouts.

    python tools/make_scenes.py data/scenes --train 400 --val 80 --size 160 --seed 0

The same options give the same files, bit for bit.
"""

import argparse
import sys

from tqdm import tqdm

from dense.demo.scenes import ADE_FOLDER, COCO_FOLDER, SceneOptions, write_scenes


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    default = SceneOptions()
    parser.add_argument("out", help=f"folder; gets {COCO_FOLDER}/ and {ADE_FOLDER}/")
    parser.add_argument("--train", type=int, default=default.train, help="training scenes")
    parser.add_argument("--val", type=int, default=default.val, help="held-out scenes")
    parser.add_argument("--size", type=int, default=default.size, help="side in pixels")
    parser.add_argument("--seed", type=int, default=default.seed)
    parser.add_argument(
        "--overwrite",
        action="store_true",
        help=f"replace {COCO_FOLDER}/ and {ADE_FOLDER}/ even if this tool did not make them",
    )
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    try:
        options = SceneOptions(args.train, args.val, args.size, args.seed)
        written = write_scenes(
            args.out,
            options,
            overwrite=args.overwrite,
            progress=lambda items, label: tqdm(items, desc=f"{label} scenes", unit="scene"),
        )
    except (ValueError, OSError) as error:
        print(f"make_scenes: {error}", file=sys.stderr)
        return 2
    state = "written to" if written else "already in"
    print(f"{args.train} training and {args.val} held-out scenes {state} {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
