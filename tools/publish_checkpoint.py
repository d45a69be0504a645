"""Strip a training checkpoint to its weights and their metadata.

    python tools/publish_checkpoint.py work_dirs/d_dw_conv_tiny/best_top1_epoch_297.pth \\
        --out published --readme configs/pretraining/README.md

Writes OUT/<recipe>-<hash>.pth and .safetensors: the weights and their metadata (model, classes,
image size, mean, std, recipe, metrics, versions). A run that averaged its weights publishes the
averaged ones, or with --weights model the others. A classifier is loaded into a new model as a
check. --readme adds the model to the table of a Markdown file, --huggingface writes a classifier
as the folder of a Hugging Face repository: config, weights, preprocessing and model card.
"""

import argparse
import sys
from pathlib import Path

from dense.waiting import waiting

with waiting("importing PyTorch"):
    from backbones import CheckpointError
    from dense import publish
    from dense.recipes import config_beside, framework_of


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("checkpoint", help="from pretrain.py, train_segmentor.py or train_detector.py")
    add("--out", default="published", help="output folder (%(default)s)")
    add("--config", help="the training's config; default: the one beside the checkpoint")
    add("--weights", choices=publish.WEIGHTS, default="averaged", help="if the run averaged them")
    add("--readme", metavar="FILE", help="add the model to the table of this Markdown file")
    add("--huggingface", metavar="FOLDER", help="write transformers' folder and a model card too")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    try:
        if args.huggingface:
            with waiting("importing transformers"):
                from dense.huggingface.folder import write_folder

            config = Path(args.config or config_beside(args.checkpoint))
            if framework_of(config) != "classification":
                raise ValueError(
                    f"--huggingface: {config} trains no classifier, which the folder must hold"
                )
        with waiting(f"publishing {args.checkpoint}"):
            done = publish.publish(
                args.checkpoint, args.out, config=args.config, weights=args.weights
            )
        if args.huggingface:
            print(f"{write_folder(done, args.huggingface)}/README.md: the model card")
    except (CheckpointError, ImportError, ValueError, OSError) as error:
        print(f"publish_checkpoint: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    print(publish.as_json(done.meta))
    for file in done.files:
        print(file)
    print(done.line)
    if args.readme:
        publish.write_line(done, args.readme)
        print(f"{args.readme}: the table has the model's row")
    return 0


if __name__ == "__main__":
    sys.exit(main())
