"""Run a trained detector, segmentor or classifier over images.

    python tools/predict.py --checkpoint work_dirs/detector/model_final.pth \\
        photos/ portrait.jpg --out predictions

CHECKPOINT was written by train_detector.py, train_segmentor.py, pretrain.py or MMDetection, or is a
whole model that the paper's authors released, or a file of export.py. The config decides on the
framework; the default is the config beside the checkpoint, and a file of export.py needs none.
OUT/overlays gets each image with its predictions drawn over it, OUT/detections a detector's boxes,
masks and classes as JSON, OUT/labels a segmentor's label maps as PNG, OUT/classes a classifier's
five best classes as JSON. Unreadable images are skipped and listed, and the exit status is then 1.
"""

import argparse
import sys
from functools import partial

from tqdm import tqdm

from dense.waiting import waiting

with waiting("importing PyTorch"):
    from dense import coco, drawing, prediction, recipes
    from dense.export.files import ExportError, is_exported


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("inputs", nargs="+", metavar="INPUT", help="images and folders of images")
    add("--checkpoint", required=True, help=".pth of a whole model, or a file of export.py")
    add("--config", help="the training's config; default: the one beside the checkpoint")
    add("--out", required=True, help="output folder")
    add("--score-thr", type=float, default=0.5, help="minimum score of detections (%(default)s)")
    add("--no-legend", action="store_true", help="no strip of class colours below the overlays")
    add(
        "--coco",
        metavar="JSON",
        help="COCO-style annotations of the images: their ids go into a detector's results and "
        "OUT/coco_results.json (with --score-thr 0.05 as COCO evaluates them)",
    )
    add("--device", help="cpu, cuda or cuda:N; default: the GPU if there is one")
    add("--resume", action="store_true", help="skip images that have results")
    add("--overwrite", action="store_true", help="predict images that have results again")
    args = parser.parse_args(argv)
    if not 0 <= args.score_thr <= 1:
        parser.error(f"--score-thr {args.score_thr}: a score between 0 and 1 is needed")
    if args.resume and args.overwrite:
        parser.error("--resume keeps results and --overwrite replaces them: name one")
    return args


def load(args: argparse.Namespace, framework: str, config: str, ids: coco.CocoIds | None):
    """The function that predicts one image and writes its results."""
    image_id = ids and ids.image
    device = pick_device(args.device)
    if framework == "detection":
        from dense.detection import load_predictor

        predictor = load_predictor(config, args.checkpoint, device)
        return prediction.detection_writer(
            predictor, args.score_thr, legend=not args.no_legend, image_id=image_id
        )
    if framework == "mmdetection":
        from dense.mmdetection import load_predictor

        predictor = load_predictor(config, args.checkpoint, device)
        draw = drawing.draw_instances_openmmlab
        return prediction.detection_writer(
            predictor, args.score_thr, draw, not args.no_legend, image_id
        )
    if framework == "classification":
        from dense.pretraining.predictor import load_predictor

        return prediction.classification_writer(load_predictor(config, args.checkpoint, device))

    from dense.segmentation import load_predictor

    return segmentation_writer(load_predictor(config, args.checkpoint, device), args)


def segmentation_writer(predictor, args: argparse.Namespace):
    prediction.write_classes(args.out, predictor.classes, predictor.palette)
    return prediction.segmentation_writer(predictor, not args.no_legend)


def load_exported(args: argparse.Namespace, ids: coco.CocoIds | None):
    """The framework of a file of ``tools/export.py``, and a function that makes its writer."""
    from dense.export.predictor import Detector, load_predictor

    for name, given in (("--config", args.config), ("--device", args.device)):
        if given not in (None, "cpu"):
            raise prediction.PredictionError(
                f"{name} {given}: {args.checkpoint} is an exported file, which runs on the CPU and "
                "holds what it needs"
            )
    predictor = load_predictor(args.checkpoint)
    if isinstance(predictor, Detector):
        return "detection", partial(
            prediction.detection_writer,
            predictor,
            args.score_thr,
            legend=not args.no_legend,
            image_id=ids and ids.image,
        )
    if hasattr(predictor, "palette"):
        return "segmentation", lambda: segmentation_writer(predictor, args)
    return "classification", lambda: prediction.classification_writer(predictor)


def pick_device(name: str | None) -> str:
    import torch

    if name is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise prediction.PredictionError(f"--device {name}: cpu, cuda or cuda:N is needed")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        count = torch.cuda.device_count()
        raise prediction.PredictionError(f"--device {name}: there are {count} GPUs here")
    return name


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    config = args.config
    try:
        ids = coco.CocoIds(args.coco) if args.coco else None
        if is_exported(args.checkpoint):
            framework, make_writer = load_exported(args, ids)
        else:
            config = config or str(recipes.config_beside(args.checkpoint))
            framework = recipes.framework_of(config)
            make_writer = partial(load, args, framework, config, ids)
        jobs = prediction.plan(
            args.inputs, args.out, framework, resume=args.resume, overwrite=args.overwrite
        )
        if ids:
            if prediction.RESULTS[framework][0] != prediction.DETECTIONS:
                raise prediction.PredictionError("--coco is for the results of detectors")
            for job in jobs:
                ids.image(job.source)
        if not jobs:
            print(f"all results are in {args.out} already")
            if ids:
                coco.write_results(args.out, ids)
            return 0
        with waiting(f"importing the framework and loading {args.checkpoint}"):
            write = make_writer()
    # The frameworks raise these for a config or checkpoint that does not fit.
    except (ValueError, ImportError, OSError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        ours = recipes.RecipeError, prediction.PredictionError, ExportError, ImportError
        if not isinstance(error, ours):
            reason = f"{args.checkpoint} with {config}: {reason}"
        print(f"predict: {reason}", file=sys.stderr)
        return 2
    failed = prediction.run(tqdm(jobs, desc="predicting", unit="image"), write)
    for error in failed:
        print(f"predict: {error}", file=sys.stderr)
    if ids:
        try:
            print(f"COCO results: {coco.write_results(args.out, ids)}")
        except prediction.PredictionError as error:
            print(f"predict: {error}", file=sys.stderr)
            return 2
    kind, _ = prediction.RESULTS[framework]
    print(f"{len(jobs) - len(failed)} images predicted: {args.out}/{prediction.OVERLAYS}, {kind}")
    if failed:
        print(f"predict: {len(failed)} of {len(jobs)} images were unreadable", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
