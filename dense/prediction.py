"""A trained detector, segmentor or classifier over photos: what to read, what to write, where."""

import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np
from PIL import Image

from dense import drawing, files
from dense.images import UnreadableImage, read_image

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".gif")
OVERLAYS, DETECTIONS, LABELS, CLASSES = "overlays", "detections", "labels", "classes"
# Where results go and what they are, by whose config it is.
RESULTS = {
    "detection": (DETECTIONS, ".json"),
    "mmdetection": (DETECTIONS, ".json"),
    "segmentation": (LABELS, ".png"),
    "classification": (CLASSES, ".json"),
}


class PredictionError(ValueError):
    """A request that cannot be met, in one line."""


@dataclass(frozen=True)
class Job:
    """One image and the files written for it.

    Attributes:
        source: the image.
        overlay: the picture drawn.
        result: the JSON of a detector or the label map of a segmentor; written last, so that it
            says that the image is done.
    """

    source: Path
    overlay: Path
    result: Path


def plan(
    inputs: Sequence[str | os.PathLike],
    out: str | os.PathLike,
    framework: str,
    *,
    resume: bool = False,
    overwrite: bool = False,
) -> list[Job]:
    """Find the images and decide where each one's files go, before anything is loaded.

    A folder is searched to its depth for images, and its tree is kept below ``out``. A file is
    taken whatever it is called.

    Args:
        inputs: images and folders.
        out: where to write; what lies in it is never an input.
        framework: what :func:`dense.recipes.framework_of` said.
        resume: leave out images that are done.
        overwrite: write over the results of earlier runs.

    Raises:
        PredictionError: an input is missing or has no image, two would be written to one place, or
            a result is there already.
    """
    out = Path(out)
    if out.exists() and not out.is_dir():
        raise PredictionError(f"--out {out} is a file; a folder is needed")
    found: dict[Path, PurePosixPath] = {}
    for entry in inputs:
        found.update(_images(Path(entry), out))

    stems = [name.with_suffix("") for name in found.values()]
    folder, suffix = RESULTS[framework]
    jobs: dict[PurePosixPath, Job] = {}
    counts = Counter(stems)
    for (source, name), stem in zip(found.items(), stems, strict=True):
        # a.jpg and a.png in one folder: the whole name tells them apart.
        key = stem if counts[stem] == 1 else name.with_name(name.name.replace(".", "_"))
        if key in jobs:
            raise PredictionError(
                f"{jobs[key].source} and {source} would be written to one place; "
                "predict them in two runs with an --out each"
            )
        jobs[key] = Job(
            source,
            out / OVERLAYS / key.with_name(key.name + ".jpg"),
            out / folder / key.with_name(key.name + suffix),
        )
    done = [job for job in jobs.values() if job.result.exists()]
    if done and not (resume or overwrite):
        raise PredictionError(
            f"{done[0].result} is there already ({len(done)} results in all); "
            "--resume keeps them and does the rest, --overwrite does them again"
        )
    return [job for job in jobs.values() if overwrite or not job.result.exists()]


def _images(entry: Path, out: Path) -> Iterator[tuple[Path, PurePosixPath]]:
    """Images of one input, each with its name below it."""
    if entry.is_file():
        yield entry, PurePosixPath(entry.name)
        return
    if not entry.is_dir():
        raise PredictionError(f"input {entry} does not exist")
    own = [(out / name).resolve() for name in (OVERLAYS, DETECTIONS, LABELS, CLASSES)]
    images = [
        path
        for path in sorted(entry.rglob("*"))
        if path.suffix.lower() in SUFFIXES
        and path.is_file()
        and not any(path.resolve().is_relative_to(folder) for folder in own)
    ]
    if not images:
        raise PredictionError(f"input {entry} holds no image ({', '.join(SUFFIXES)})")
    for path in images:
        yield path, PurePosixPath(path.relative_to(entry).as_posix())


def run(
    jobs: Iterable[Job], predict_and_write: Callable[[np.ndarray, Job], None]
) -> list[UnreadableImage]:
    """Do the jobs one after another; returns the images that could not be read or predicted."""
    failed = []
    for job in jobs:
        try:
            image = read_image(job.source)
        except UnreadableImage as error:
            failed.append(error)
            continue
        for path in (job.overlay, job.result):
            path.parent.mkdir(parents=True, exist_ok=True)
        try:
            predict_and_write(image, job)
        # The frameworks' transforms raise all sorts of things for a picture two pixels wide.
        except Exception as error:
            lines = str(error).strip().splitlines() or [type(error).__name__]
            height, width = image.shape[:2]
            failed.append(
                UnreadableImage(f"{job.source} ({width}x{height}) cannot be predicted: {lines[0]}")
            )
    return failed


def detection_writer(
    predictor: Callable[[np.ndarray], dict],
    score_threshold: float,
    draw: Callable[..., np.ndarray] | None = None,
) -> Callable[[np.ndarray, Job], None]:
    """What :func:`run` calls for a detector of :func:`dense.detection.load_predictor`.

    ``draw`` is :func:`dense.drawing.draw_instances` unless given, as
    :func:`dense.drawing.draw_instances_openmmlab` is for OpenMMLab.

    The JSON has the image's ``image``, ``height``, ``width``, the ``classes`` by index, and
    ``instances``, best first, as in COCO's results: ``bbox`` ``[x, y, width, height]`` in pixels,
    ``score``, ``segmentation`` (RLE of pycocotools), with ``class_id``, the index, and
    ``class_name``.
    """

    def write(image: np.ndarray, job: Job) -> None:
        found = predictor(image)
        keep = found["scores"] >= score_threshold
        names = found["class_names"]
        boxes, scores, classes = (found[key][keep] for key in ("boxes", "scores", "classes"))
        masks = None if found["masks"] is None else found["masks"][keep]
        texts = [f"{names[c]} {100 * s:.0f}%" for c, s in zip(classes, scores, strict=True)]
        _save_image((draw or drawing.draw_instances)(image, boxes, masks, texts), job.overlay)
        content = {
            "image": str(job.source),
            "height": image.shape[0],
            "width": image.shape[1],
            "classes": names,
            "instances": _instances(boxes, scores, classes, masks, names),
        }
        files.write(job.result, json.dumps(content, indent=1))

    return write


def _instances(
    boxes: np.ndarray,
    scores: np.ndarray,
    classes: np.ndarray,
    masks: np.ndarray | None,
    names: Sequence[str],
) -> list[dict]:
    from pycocotools import mask as rle

    instances = []
    for index, (x1, y1, x2, y2) in enumerate(boxes.tolist()):
        instance = {
            "class_id": int(classes[index]),
            "class_name": names[classes[index]],
            "score": round(float(scores[index]), 5),
            "bbox": [round(v, 2) for v in (x1, y1, x2 - x1, y2 - y1)],
        }
        if masks is not None:
            encoded = rle.encode(np.asfortranarray(masks[index].astype(np.uint8)))
            encoded["counts"] = encoded["counts"].decode("ascii")
            instance["segmentation"] = encoded
        instances.append(instance)
    return instances


def segmentation_writer(
    predictor: Callable[[np.ndarray], np.ndarray],
) -> Callable[[np.ndarray, Job], None]:
    """What :func:`run` calls for a segmentor of :func:`dense.segmentation.load_predictor`.

    The label map is a greyscale PNG of class indices, 0 the first of the predictor's classes, with
    16 bits where there are more than 256; ``classes.json`` beside the label maps has the names.
    """
    drawn = drawing.segmentation_drawer(predictor.classes, predictor.palette)
    dtype = np.uint8 if len(predictor.classes) <= 256 else np.uint16

    def write(image: np.ndarray, job: Job) -> None:
        labels = np.asarray(predictor(image))
        _save_image(drawn(image, labels), job.overlay)
        label_map = Image.fromarray(labels.astype(dtype))
        files.write(job.result, lambda path: label_map.save(path, format="PNG"))

    return write


def classification_writer(
    predictor: Callable[[np.ndarray], np.ndarray],
) -> Callable[[np.ndarray, Job], None]:
    """What :func:`run` calls for a classifier of :mod:`dense.pretraining.predictor`.

    The JSON has the image's ``image`` and its five best ``classes``, best first: ``class_id``,
    ``class_name`` and ``score``, the probability; they are written over the photo too.
    """

    def write(image: np.ndarray, job: Job) -> None:
        scores = predictor(image)
        best = scores.argsort()[::-1][:5]
        names = [predictor.classes[index] for index in best]
        _save_image(
            drawing.draw_lines(
                image,
                [f"{name} {100 * scores[i]:.0f}%" for i, name in zip(best, names, strict=True)],
            ),
            job.overlay,
        )
        entries = [
            {"class_id": int(i), "class_name": name, "score": round(float(scores[i]), 5)}
            for i, name in zip(best, names, strict=True)
        ]
        content = {"image": str(job.source), "classes": entries}
        files.write(job.result, json.dumps(content, indent=1))

    return write


def write_classes(
    out: str | os.PathLike, classes: Sequence[str], palette: Sequence[Sequence[int]]
) -> None:
    """``classes.json``: what the values in a segmentor's label maps mean, ``index``, ``name`` and
    the ``colour`` (RGB) in the overlays."""
    path = Path(out, LABELS, "classes.json")
    path.parent.mkdir(parents=True, exist_ok=True)
    entries = [
        {"index": index, "name": name, "colour": list(colour)}
        for index, (name, colour) in enumerate(zip(classes, palette, strict=True))
    ]
    files.write(path, json.dumps(entries, indent=1))


def _save_image(image: np.ndarray, path: Path) -> None:
    picture = Image.fromarray(image)
    files.write(path, lambda partial: picture.save(partial, format="JPEG", quality=92))
