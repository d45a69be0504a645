"""A trained detector, segmentor or classifier over photos: what to read, what to write, where.

Neither framework is imported before it is known which one the config belongs to.
"""

import ast
import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from dense import files
from dense.images import UnsetRange, to_rgb

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


class UnreadableImage(PredictionError):
    """One image that cannot be used; the others can."""


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


def framework_of(config: str | os.PathLike) -> str:
    """Whose config a file is: ``"detection"`` (LazyConfig), ``"segmentation"`` (MMSegmentation),
    ``"mmdetection"`` or ``"classification"`` (pretraining).

    The file is parsed, not run, to tell LazyConfig from mmengine. mmengine's configs inherit by
    ``_base_`` or ``read_base()`` or import nothing; LazyConfig's import what they build. A
    ``.yaml`` is a LazyConfig that a training saved. ``default_scope`` tells mmengine's apart.

    Raises:
        PredictionError: no such file, or it is neither.
    """
    path = Path(config)
    if not path.is_file():
        raise PredictionError(f"config {config} does not exist")
    if path.suffix in (".yaml", ".yml"):
        return "detection"
    if path.suffix != ".py":
        raise PredictionError(f"config {config}: a .py or .yaml file is needed")
    try:
        tree = ast.parse(path.read_text())
    except (SyntaxError, UnicodeDecodeError) as error:
        raise PredictionError(f"config {config} is not Python: {error}") from error
    names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    imports = any(isinstance(node, ast.Import | ast.ImportFrom) for node in ast.walk(tree))
    if imports and not names & {"_base_", "read_base"}:
        return "detection"
    return _mmengine_kind(path)


def _mmengine_kind(config: Path) -> str:
    """The package that an mmengine config is for; MMSegmentation where that cannot be told."""
    try:
        from mmengine.config import Config

        cfg = Config.fromfile(config, import_custom_modules=False)
    # What is wrong with it is said where it is loaded.
    except Exception:
        return "segmentation"
    if cfg.get("model", {}).get("type") == "ImageClassifier":
        return "classification"
    return "mmdetection" if cfg.get("default_scope") == "mmdet" else "segmentation"


def config_beside(checkpoint: str | os.PathLike) -> Path:
    """The config that a training wrote into the folder of its checkpoints.

    Raises:
        PredictionError: no such checkpoint, or the folder holds no config or several.
    """
    checkpoint = Path(checkpoint)
    if not checkpoint.is_file():
        raise PredictionError(f"checkpoint {checkpoint} does not exist")
    folder = checkpoint.parent
    saved = folder / "config.yaml"
    found = [saved] if saved.is_file() else sorted(folder.glob("*.py"))
    if len(found) == 1:
        return found[0]
    if not found:
        raise PredictionError(f"{folder} holds no config; name the one trained with by --config")
    names = ", ".join(path.name for path in found)
    raise PredictionError(f"{folder} holds several configs ({names}); name one by --config")


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
        framework: what :func:`framework_of` said.
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


def read_image(path: str | os.PathLike) -> np.ndarray:
    """An image as it is meant to be seen: turned as its EXIF data says, in RGB.

    Greyscale, palette and CMYK are converted, 16-bit greyscale keeps its upper 8 bits, an alpha
    channel is dropped, and an animation gives its first frame.

    Returns:
        ``(H, W, 3)`` uint8.

    Raises:
        UnreadableImage: not an image, or damaged.
    """
    try:
        with Image.open(path) as opened:
            return np.array(to_rgb(opened))
    except UnsetRange as error:
        raise UnreadableImage(f"{path}: {error}") from error
    # A damaged file raises whatever its decoder meets first.
    except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as error:
        raise UnreadableImage(f"{path} cannot be read as an image: {error}") from error


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

    ``draw`` is :func:`draw_instances` unless :func:`draw_instances_openmmlab` is given.

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
        _save_image((draw or draw_instances)(image, boxes, masks, texts), job.overlay)
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
    drawn = segmentation_drawer(predictor.classes, predictor.palette)
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
            draw_lines(
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


def draw_lines(image: np.ndarray, lines: Sequence[str]) -> np.ndarray:
    """Lines of text in the upper left corner of an image ``(H, W, 3)``, enlarged if it is small."""
    scale = _enlargement(image)
    picture = Image.fromarray(image.repeat(scale, axis=0).repeat(scale, axis=1))
    draw = ImageDraw.Draw(picture, "RGBA")
    size = max(10, min(picture.size) // 24)
    font = ImageFont.load_default(size)
    box = draw.multiline_textbbox((size // 2, size // 2), "\n".join(lines), font=font)
    draw.rectangle((0, 0, box[2] + size // 2, box[3] + size // 2), fill=(0, 0, 0, 150))
    draw.multiline_text((size // 2, size // 2), "\n".join(lines), font=font, fill=(255, 255, 255))
    return np.asarray(picture)


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


def draw_instances(
    image: np.ndarray, boxes: np.ndarray, masks: np.ndarray | None, texts: Sequence[str]
) -> np.ndarray:
    """Boxes, masks and a text each over an image, by Detectron2's visualizer.

    Args:
        image: ``(H, W, 3)`` uint8, RGB.
        boxes: ``(N, 4)`` as x1, y1, x2, y2 in pixels.
        masks: ``(N, H, W)`` bool, or None.
        texts: N of them.

    Returns:
        ``(sH, sW, 3)`` uint8; small images are enlarged ``s`` times for the text to be legible.
    """
    from detectron2.utils.colormap import colormap
    from detectron2.utils.visualizer import Visualizer

    colours = colormap(rgb=True, maximum=1)
    visualizer = Visualizer(image, scale=_enlargement(image))
    visualizer.overlay_instances(
        boxes=boxes,
        masks=None if masks is None else [mask.astype(np.uint8) for mask in masks],
        labels=list(texts),
        assigned_colors=[colours[index % len(colours)] for index in range(len(boxes))],
    )
    return np.ascontiguousarray(visualizer.output.get_image())


def draw_instances_openmmlab(
    image: np.ndarray, boxes: np.ndarray, masks: np.ndarray | None, texts: Sequence[str]
) -> np.ndarray:
    """As :func:`draw_instances`, by mmengine's visualizer."""
    from matplotlib import colormaps
    from mmengine.visualization import Visualizer

    scale = _enlargement(image)
    visualizer = Visualizer(image=image.repeat(scale, axis=0).repeat(scale, axis=1))
    if len(boxes):
        table = (np.asarray(colormaps["tab10"].colors) * 255).astype(int).tolist()
        colours = [tuple(table[index % len(table)]) for index in range(len(boxes))]
        if masks is not None:
            masks = masks.astype(bool).repeat(scale, axis=1).repeat(scale, axis=2)
            visualizer.draw_binary_masks(masks, colors=colours, alphas=0.5)
        visualizer.draw_bboxes(boxes * scale, edge_colors=colours, line_widths=1)
        visualizer.draw_texts(
            list(texts),
            boxes[:, :2] * scale,
            font_sizes=max(8, min(image.shape[:2]) * scale // 40),
            colors="white",
            vertical_alignments="top",
            bboxes=dict(facecolor="black", alpha=0.6, pad=1, edgecolor="none"),
        )
    return visualizer.get_image()


def segmentation_drawer(
    classes: Sequence[str], palette: Sequence[Sequence[int]]
) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
    """A function of an image ``(H, W, 3)`` and its labels ``(H, W)`` that draws one over the other,
    by mmengine's visualizer; small images are enlarged for the text to be legible."""
    from mmengine.visualization import Visualizer

    # MMSegmentation's own visualizer sorts a list of all pixels for each name: seconds a photo.
    visualizer = Visualizer()

    def draw(image: np.ndarray, labels: np.ndarray) -> np.ndarray:
        scale = _enlargement(image)
        image, labels = (a.repeat(scale, axis=0).repeat(scale, axis=1) for a in (image, labels))
        shown = [int(label) for label in np.unique(labels) if 0 <= label < len(classes)]
        visualizer.set_image(image)
        if shown:
            masks = np.stack([labels == label for label in shown])
            colours = [tuple(palette[label]) for label in shown]
            visualizer.draw_binary_masks(masks, colors=colours, alphas=0.6)
            visualizer.draw_texts(
                [classes[label] for label in shown],
                np.array([_deepest_point(mask) for mask in masks]),
                font_sizes=max(8, min(image.shape[:2]) // 40),
                colors="white",
                horizontal_alignments="center",
                vertical_alignments="center",
                bboxes=dict(facecolor="black", alpha=0.6, pad=2, edgecolor="none"),
            )
        return visualizer.get_image()

    return draw


def _deepest_point(mask: np.ndarray) -> tuple[int, int]:
    """The x and y of a mask farthest from its border, where its name hides no edge."""
    import cv2

    # A frame of zeros makes the image's own border count as one.
    depth = cv2.distanceTransform(np.pad(mask.astype(np.uint8), 1), cv2.DIST_L2, 3)
    y, x = np.unravel_index(depth[1:-1, 1:-1].argmax(), mask.shape)
    return int(x), int(y)


def _enlargement(image: np.ndarray) -> int:
    return max(1, round(480 / max(image.shape[:2])))


def _save_image(image: np.ndarray, path: Path) -> None:
    picture = Image.fromarray(image)
    files.write(path, lambda partial: picture.save(partial, format="JPEG", quality=92))
