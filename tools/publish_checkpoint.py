"""Strip a training's checkpoint to its weights and what they are, ready to be given away.

    python tools/publish_checkpoint.py work_dirs/d_dw_conv_tiny/best_top1_epoch_297.pth \\
        --out published --readme configs/pretraining/README.md

Writes OUT/<recipe>-<hash>.pth and .safetensors: the weights with their meta (model, classes, image
size, mean, std, recipe, metrics, versions). Of a run with averaged weights those are taken, or with
--weights model the others. A classifier is loaded back before it is called published. --readme puts
its line into the table of a document.
"""

import argparse
import sys

from backbones import CheckpointError
from dense import publish


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("checkpoint", help="of pretrain.py, train_segmentor.py or train_detector.py")
    add("--out", default="published", help="folder to write into (published)")
    add("--config", help="what it was trained with; default: the one beside the checkpoint")
    add("--weights", choices=publish.WEIGHTS, default="averaged", help="where a run averaged them")
    add("--readme", metavar="FILE", help="put the model's line into its table")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Publish, and say what was written."""
    args = parse_args(argv)
    try:
        done = publish.publish(args.checkpoint, args.out, config=args.config, weights=args.weights)
    except (CheckpointError, ValueError, OSError) as error:
        print(f"publish_checkpoint: {error}", file=sys.stderr)
        return 2
    print(publish.as_json(done.meta))
    for file in done.files:
        print(file)
    print(done.line)
    if args.readme:
        publish.write_line(done, args.readme)
        print(f"{args.readme}: its line is in the table")
    return 0


if __name__ == "__main__":
    sys.exit(main())
