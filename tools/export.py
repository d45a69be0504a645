"""Export a trained classifier, segmentor or detector, or the backbone of one; check it on photos.

    python tools/export.py work_dirs/segmentor --to onnx

CHECKPOINT is a .pth of pretrain.py, train_segmentor.py or train_detector.py, or the folder of the
run. The file holds one graph for every batch (a detector's: of one image), height and width from 32
pixels up, and in its metadata what an image needs before it and the names of the classes:
tools/predict.py --checkpoint takes it, and dense/export/README.md runs it without PyTorch. It is
run beside the eager network on photos of several sizes; where an output differs by more than the
bar, nothing is kept and the exit status is 1. --int8 is calibrated on the same photos and keeps in
float32 what it must. Detectors are written in float32, as onnx or openvino.
"""

import argparse
import os
import sys
import tempfile
from pathlib import Path

from dense.waiting import waiting

with waiting("importing PyTorch"):
    from backbones import CheckpointError
    from dense.export.files import FORMATS, ExportError, kind_of, require_engine
    from dense.export.numbers import PRECISIONS

SAMPLES = ("imagenet/val", "ADEChallengeData2016/images/validation")
DETECTORS = ("onnx", "openvino")  # the formats of detectors
COMPARED, CALIBRATED = 2, 16  # photos


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("checkpoint", help=".pth of a whole network, or its folder")
    add("--to", required=True, metavar="FORMAT", help=", ".join(FORMATS))
    add("--part", choices=("whole", "backbone"), default="whole", help="default: %(default)s")
    add("--config", help="the training's config; default: the one beside the checkpoint")
    add("--out", help="the file; default: beside the checkpoint, named after it")
    add(
        "--photos", help="folder of photos to check on; default: DENSE_SAMPLE_DATA, else drawn ones"
    )
    smaller = parser.add_mutually_exclusive_group()
    texts = {"int8": "8-bit numbers", "bf16": "computed in bfloat16", "fp16": "weights in float16"}
    for name, text in texts.items():
        smaller.add_argument(
            f"--{name}", action="store_const", const=name, dest="precision", help=text
        )
    parser.set_defaults(precision="float32")
    return parser.parse_args(argv)


def export(args: argparse.Namespace) -> int:
    require_engine(args.to)
    if args.to not in PRECISIONS[args.precision]:
        valid = ", ".join(PRECISIONS[args.precision])
        raise ExportError(f"--{args.precision} --to {args.to}: {valid} can be written in it")
    suffix = FORMATS[args.to]
    if args.out and (kind := kind_of(args.out)) != args.to:
        other = f", one of {kind} in {FORMATS[kind]}" if kind else ""
        raise ExportError(f"--out {args.out}: a file of {args.to} ends in {suffix}{other}")
    # Before what takes long: PyTorch, the frameworks, the capture of the graph.
    import torch

    from dense.export import files, sources

    photos = find_photos(args.photos, CALIBRATED if args.precision == "int8" else COMPARED)
    with waiting(f"importing the framework and loading {args.checkpoint}"):
        source = sources.read_source(args.checkpoint, args.config, args.part)
    if source.about["task"] == "detection" and (
        args.to not in DETECTORS or args.precision != "float32"
    ):
        raise ExportError(f"detectors are written in float32 as {' or '.join(DETECTORS)}")
    source.about.update(format=args.to, precision=args.precision)
    out = Path(args.out) if args.out else _beside(Path(args.checkpoint), args.part, suffix)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=".export-") as scratch:
        with waiting(f"capturing the graph and writing it as {args.to}"):
            written = write(source, Path(scratch, out.name), args.precision, photos)
        with waiting("comparing the file with the network"):
            run = files.Runner(written[0], torch.get_num_threads())
            found = compare(source, run, photos[:COMPARED], args.precision)
        print("\n".join(found.lines(args.to)))
        if missed := found.missed(args.precision):
            print(f"export: {missed}: nothing is kept", file=sys.stderr)
            return 1
        # The file that names the others comes last.
        for file in reversed(written):
            os.replace(file, out.parent / file.name)
    size = sum((out.parent / file.name).stat().st_size for file in written) / 1e6
    print(f"{out}: {source.about['task']}, {args.to}, {size:.1f} MB")
    return 0


def compare(source, run, photos, precision: str):
    """The file beside eager, as its task and precision need it."""
    if source.about["task"] == "detection":
        from dense.export.detections import compare_detections

        return compare_detections(source, run, photos)
    from dense.export import checking

    return checking.compare(source, run, photos, smallest=precision == "float32")


def write(source, out: Path, precision: str, photos) -> list[Path]:
    """Write the file in a precision; return its files, first the one that is read."""
    from dense.export import checking, files, numbers

    if precision == "float32":
        return files.write(source.network, source.about, out)
    graph = out.with_name(".float32.onnx")
    files.write(source.network, source.about, graph)
    if precision in ("bf16", "fp16"):
        return files.to_openvino(graph, out, precision)
    smaller = out.with_suffix(".onnx")
    batches = [checking.normalised(photo, source.about, source.size) for photo in photos]
    cosine_of = checking.cosines_with(source, photos[:COMPARED])
    done = numbers.quantise_within(graph, smaller, batches, cosine_of, checking.COSINE)
    print("\n".join(done.lines()))
    return [smaller] if out == smaller else files.to_openvino(smaller, out)


def find_photos(folder: str | None, count: int):
    """Photos of a folder, else of DENSE_SAMPLE_DATA, else drawn scenes."""
    from dense.export import checking

    if folder and not Path(folder).is_dir():
        raise ExportError(f"--photos {folder}: there is no such folder")
    sample = os.environ.get("DENSE_SAMPLE_DATA")
    if sample and not folder:
        # Its other folders have label maps, which are images too.
        found = [Path(sample, name) for name in SAMPLES if Path(sample, name).is_dir()]
        folder = found[0] if found else None
    if folder:
        return checking.find_photos(folder, count)
    import numpy as np

    from dense.demo.scenes import draw_scene

    return [draw_scene(np.random.default_rng(seed), 256).image for seed in range(count)]


def _beside(checkpoint: Path, part: str, suffix: str) -> Path:
    name = checkpoint.resolve().name if checkpoint.is_dir() else checkpoint.stem
    folder = checkpoint if checkpoint.is_dir() else checkpoint.parent
    return folder / f"{name}{'' if part == 'whole' else '-' + part}{suffix}"


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    try:
        return export(args)
    # What the frameworks raise for a config or checkpoint that does not fit.
    except (CheckpointError, ValueError, ImportError, OSError, RuntimeError) as error:
        print(f"export: {' '.join(str(error).split())}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
