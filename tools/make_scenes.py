"""Generate images of three kinds of shapes with ground truth, in COCO's and ADE20K's layouts.

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
    add = parser.add_argument
    add("out", help=f"output folder of {COCO_FOLDER}/ and {ADE_FOLDER}/")
    add("--train", type=int, default=default.train, help="training scenes (%(default)s)")
    add("--val", type=int, default=default.val, help="validation scenes (%(default)s)")
    add("--size", type=int, default=default.size, help="side in pixels (%(default)s)")
    add("--seed", type=int, default=default.seed, help="random seed (%(default)s)")
    add("--overwrite", action="store_true", help="replace folders that this tool did not make")
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
