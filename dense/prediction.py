"""Run a detector, segmentor or classifier over images and write its results.

>>> jobs = plan(["photos/"], "predictions", "segmentation")
>>> failed = run(jobs, segmentation_writer(predictor))
"""

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
# Folder and suffix of the results, by the framework of the config.
RESULTS = {
    "detection": (DETECTIONS, ".json"),
    "mmdetection": (DETECTIONS, ".json"),
    "segmentation": (LABELS, ".png"),
    "classification": (CLASSES, ".json"),
}


class PredictionError(ValueError):
    """A request that cannot be met; the message is one line."""


@dataclass(frozen=True)
class Job:
    """One image and the files written for it.

    Attributes:
        source: the image.
        overlay: the image with its predictions drawn over it, a JPEG.
        result: JSON (detector, classifier) or PNG label map (segmentor). It is written last: an
            image whose result exists is done.
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
    """Find the images and choose the paths of their results, before any model is loaded.

    Args:
        inputs: images, and folders that are searched recursively; the tree of a folder is kept
            below ``out``. A file that is named is taken whatever its suffix.
        out: folder of the results; results of earlier runs in it are never taken as inputs.
        framework: from :func:`dense.recipes.framework_of`.
        resume: skip images whose result exists.
        overwrite: predict images whose result exists again.

    Raises:
        PredictionError: an input is missing or has no image, two images have the same result path,
            or a result exists and neither ``resume`` nor ``overwrite`` is given.
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
        # a.jpg and a.png in one folder become a_jpg and a_png.
        key = stem if counts[stem] == 1 else name.with_name(name.name.replace(".", "_"))
        if key in jobs:
            raise PredictionError(
                f"{jobs[key].source} and {source} would be written to one place; "
                "predict them in two runs, each with its own --out"
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
    """The images of one input, each with its path relative to the input."""
    if entry.is_file():
        yield entry, PurePosixPath(entry.name)
        return
    if not entry.is_dir():
        raise PredictionError(f"input {entry} does not exist")
    results = [(out / name).resolve() for name in (OVERLAYS, DETECTIONS, LABELS, CLASSES)]
    images = [
        path
        for path in sorted(entry.rglob("*"))
        if path.suffix.lower() in SUFFIXES
        and path.is_file()
        and not any(path.resolve().is_relative_to(folder) for folder in results)
    ]
    if not images:
        raise PredictionError(f"input {entry} holds no image ({', '.join(SUFFIXES)})")
    for path in images:
        yield path, PurePosixPath(path.relative_to(entry).as_posix())


def run(
    jobs: Iterable[Job], predict_and_write: Callable[[np.ndarray, Job], None]
) -> list[UnreadableImage]:
    """Do the jobs one by one; return an error for each image that was not read or predicted."""
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
        # The frameworks' transforms raise many kinds of exceptions, for very thin images say.
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
    legend: bool = True,
    image_id: Callable[[Path], int] | None = None,
) -> Callable[[np.ndarray, Job], None]:
    """The ``predict_and_write`` of :func:`run` for a detector.

    The JSON has ``image`` (path), ``image_id`` if known, ``height``, ``width``, ``classes`` (names
    by index) and ``instances``, best first, in COCO's results format: ``bbox`` as
    ``[x, y, width, height]`` in pixels, ``score``, ``segmentation`` (RLE of pycocotools),
    ``class_id`` and ``class_name``.

    Args:
        predictor: from ``load_predictor`` of :mod:`dense.detection` or :mod:`dense.mmdetection`.
        score_threshold: instances with lower scores are left out, 0 to 1.
        draw: None is :func:`dense.drawing.draw_instances`, which needs Detectron2.
        legend: name the colours of the classes below the overlay.
        image_id: an image's id in COCO-style annotations, by its path.
    """

    def write(image: np.ndarray, job: Job) -> None:
        found = predictor(image)
        keep = found["scores"] >= score_threshold
        names = found["class_names"]
        boxes, scores, classes = (found[key][keep] for key in ("boxes", "scores", "classes"))
        masks = None if found["masks"] is None else found["masks"][keep]
        texts = [f"{names[c]} {100 * s:.0f}%" for c, s in zip(classes, scores, strict=True)]
        colours = drawing.class_colours(len(names))
        drawn = (draw or drawing.draw_instances)(
            image, boxes, masks, texts, [colours[index] for index in classes]
        )
        shown = {names[index]: colours[index] for index in np.unique(classes)}
        _save_image(drawing.with_legend(drawn, shown if legend else {}), job.overlay)
        instances = [
            {
                "class_id": int(index),
                "class_name": names[index],
                "score": round(float(score), 5),
                "bbox": [round(v, 2) for v in (x1, y1, x2 - x1, y2 - y1)],
            }
            for (x1, y1, x2, y2), score, index in zip(boxes.tolist(), scores, classes, strict=True)
        ]
        if masks is not None:
            for instance, mask in zip(instances, masks, strict=True):
                instance["segmentation"] = _run_lengths(mask)
        content = {
            "image": str(job.source),
            **({"image_id": image_id(job.source)} if image_id else {}),
            "height": image.shape[0],
            "width": image.shape[1],
            "classes": names,
            "instances": instances,
        }
        files.write(job.result, json.dumps(content, indent=1))

    return write


def _run_lengths(mask: np.ndarray) -> dict:
    from pycocotools import mask as rle

    encoded = rle.encode(np.asfortranarray(mask.astype(np.uint8)))
    return {**encoded, "counts": encoded["counts"].decode("ascii")}


def segmentation_writer(
    predictor: Callable[[np.ndarray], np.ndarray], legend: bool = True
) -> Callable[[np.ndarray, Job], None]:
    """The ``predict_and_write`` of :func:`run` for :func:`dense.segmentation.load_predictor`.

    The result is a greyscale PNG of class indices: 0 is the first class; 8 bits, or 16 with more
    than 256 classes. ``legend`` names the colours of the classes below the overlay.
    """
    drawn = drawing.segmentation_drawer(predictor.classes, predictor.palette)
    dtype = np.uint8 if len(predictor.classes) <= 256 else np.uint16

    def write(image: np.ndarray, job: Job) -> None:
        labels = np.asarray(predictor(image))
        shown = {
            predictor.classes[index]: predictor.palette[index]
            for index in np.unique(labels)
            if index < len(predictor.classes)
        }
        picture = drawing.with_legend(drawn(image, labels), shown if legend else {})
        _save_image(picture, job.overlay)
        label_map = Image.fromarray(labels.astype(dtype))
        files.write(job.result, lambda path: label_map.save(path, format="PNG"))

    return write


def classification_writer(
    predictor: Callable[[np.ndarray], np.ndarray],
) -> Callable[[np.ndarray, Job], None]:
    """The ``predict_and_write`` of :func:`run` for :mod:`dense.pretraining.predictor`.

    The JSON has ``image`` (path) and the five best ``classes``, best first: ``class_id``,
    ``class_name`` and ``score``, the probability.
    """

    def write(image: np.ndarray, job: Job) -> None:
        scores = predictor(image)
        best = scores.argsort()[::-1][:5]
        names = [predictor.classes[index] for index in best]
        lines = [f"{name} {100 * scores[i]:.0f}%" for i, name in zip(best, names, strict=True)]
        _save_image(drawing.draw_lines(image, lines), job.overlay)
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
    """Write ``out/labels/classes.json``: each label's ``index``, ``name`` and ``colour`` (RGB)."""
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
