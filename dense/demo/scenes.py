"""Generate images with ground truth, in the folder layouts of COCO and ADE20K.

A scene has one to three large shapes on a plain background. Each class has its own texture (discs
striped, boxes chequered, triangles dotted) and a minimum contrast, so that a very small network
learns the classes on a CPU in minutes.
"""

import json
import os
import shutil
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from dense import files

SHAPES = ("disc", "box", "triangle")
SEGMENTATION_CLASSES = ("background", *SHAPES)
COCO_FOLDER = "coco"
ADE_FOLDER = "ADEChallengeData2016"
MARKER = "scenes.json"

_VERSION = 1
_STAGING = ".scenes-partial"
_LUMA = np.array([0.299, 0.587, 0.114])
_MIN_CONTRAST = 70
_MIN_VISIBLE = 0.55


@dataclass(frozen=True)
class SceneOptions:
    """Options of a data set; equal options give equal files, bit for bit.

    Attributes:
        train: number of training scenes.
        val: number of validation scenes.
        size: side of the square images in pixels.
        seed: a scene depends on the seed, its split, its number and the size, so that a larger set
            of one seed begins with the scenes of the smaller.

    Raises:
        ValueError: a value is out of range.
    """

    train: int = 400
    val: int = 80
    size: int = 160
    seed: int = 0

    def __post_init__(self) -> None:
        count = (1, 999_999)
        limits = {"train": count, "val": count, "size": (64, 2048), "seed": (0, 2**32 - 1)}
        for name, (low, high) in limits.items():
            value = getattr(self, name)
            if not low <= value <= high:
                raise ValueError(f"{name} is {value}; it must be between {low} and {high}")


@dataclass(frozen=True)
class Scene:
    """One image and its ground truth.

    Attributes:
        image: ``(H, W, 3)`` uint8, RGB.
        masks: ``(N, H, W)`` bool, the visible part of each shape, without overlaps.
        classes: N indices into :data:`SHAPES`.
    """

    image: np.ndarray
    masks: np.ndarray
    classes: tuple[int, ...]

    def labels(self) -> np.ndarray:
        """``(H, W)`` uint8: 1 is background, 2 and up are shapes; 0 (ADE20K: other) is unused."""
        labels = np.ones(self.image.shape[:2], np.uint8)
        for mask, shape in zip(self.masks, self.classes, strict=True):
            labels[mask] = 2 + shape
        return labels


def draw_scene(rng: np.random.Generator, size: int) -> Scene:
    """Draw one scene of ``size`` x ``size`` pixels with one to three shapes.

    Later shapes cover earlier ones. A layout is drawn again if a shape is mostly covered or has a
    hole, which COCO's polygons cannot represent.
    """
    background = rng.uniform(20, 235, 3)
    wanted = int(rng.integers(1, 4))
    while True:
        shapes = [(int(rng.integers(len(SHAPES))), *_place(rng, size)) for _ in range(wanted)]
        full = np.stack([_inside(SHAPES[kind], *axes) for kind, *axes in shapes])
        visible = full.copy()
        for lower in range(wanted - 1):
            visible[lower] &= ~full[lower + 1 :].any(axis=0)
        if all(_usable(*pair) for pair in zip(visible, full, strict=True)):
            break

    image = np.broadcast_to(background, (size, size, 3)).copy()
    for (kind, u, v, _), mask in zip(shapes, visible, strict=True):
        light, dark = _colours(rng, background)
        pattern = _texture(SHAPES[kind], u / size, v / size)[..., None]
        image[mask] = np.where(pattern, light, dark)[mask]
    image += rng.normal(0, 4, image.shape)
    return Scene(
        image=image.round().clip(0, 255).astype(np.uint8),
        masks=visible,
        classes=tuple(kind for kind, *_ in shapes),
    )


def _place(rng: np.random.Generator, size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Where a shape goes: pixel centres along its rotated axes, and half its extent along each.

    All in pixels; the axes begin at the shape's centre.
    """
    half = rng.uniform(0.18, 0.28, 2) * size
    margin = half.max()
    centre = rng.uniform(margin, size - margin, 2)
    angle = rng.uniform(0, 2 * np.pi)
    y, x = np.mgrid[:size, :size] + 0.5
    x, y = x - centre[0], y - centre[1]
    cos, sin = np.cos(angle), np.sin(angle)
    return cos * x + sin * y, cos * y - sin * x, half


def _inside(shape: str, u: np.ndarray, v: np.ndarray, half: np.ndarray) -> np.ndarray:
    u, v = u / half[0], v / half[1]
    if shape == "disc":
        return u**2 + v**2 <= 1
    if shape == "box":
        return np.maximum(abs(u), abs(v)) <= 0.85
    return (v <= 0.8) & (v >= 2 * abs(u) - 1)


def _texture(shape: str, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """``(size, size)`` bool, where the lighter colour goes: stripes, squares or dots."""
    if shape == "disc":
        return (16 * u) % 1 < 0.5
    if shape == "box":
        return (np.floor(10 * u) + np.floor(10 * v)) % 2 == 0
    u, v = (14 * u) % 1 - 0.5, (14 * v) % 1 - 0.5
    return u**2 + v**2 < 0.08


def _usable(visible: np.ndarray, full: np.ndarray) -> bool:
    import cv2

    if visible.sum() < _MIN_VISIBLE * full.sum():
        return False
    _, family = cv2.findContours(visible.astype(np.uint8), cv2.RETR_CCOMP, cv2.CHAIN_APPROX_SIMPLE)
    has_holes = (family[0, :, 3] >= 0).any()
    return not has_holes


def _colours(rng: np.random.Generator, background: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Two colours of different luminance, both distinct from the background."""
    while True:
        light, dark = rng.uniform(0, 255, (2, 3))
        luma = [_LUMA @ colour for colour in (light, dark, background)]
        if (
            luma[0] - luma[1] > _MIN_CONTRAST
            and abs(luma[0] + luma[1] - 2 * luma[2]) > _MIN_CONTRAST / 2
            and min(np.linalg.norm(c - background) for c in (light, dark)) > _MIN_CONTRAST
        ):
            return light, dark


def polygons(mask: np.ndarray) -> list[list[float]]:
    """Convert a mask ``(H, W)`` bool without holes to COCO's polygons.

    Returns:
        A flat list ``[x, y, x, y, ...]`` in pixels for each connected part. pycocotools decodes
        them to exactly the same mask.
    """
    import cv2

    # OpenCV's contours run through pixel centres, half a pixel inside the border. On a doubled mask
    # that is a quarter of a pixel, and the polygon encloses all pixel centres.
    doubled = mask.astype(np.uint8).repeat(2, axis=0).repeat(2, axis=1)
    contours, _ = cv2.findContours(doubled, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE)
    return [((contour.reshape(-1) + 0.5) / 2).tolist() for contour in contours]


def _annotation(mask: np.ndarray, **ids: int) -> dict:
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    x, y = int(columns[0]), int(rows[0])
    return {
        **ids,
        "segmentation": polygons(mask),
        "bbox": [x, y, int(columns[-1]) + 1 - x, int(rows[-1]) + 1 - y],
        "area": int(mask.sum()),
        "iscrowd": 0,
    }


def write_scenes(
    out: str | os.PathLike,
    options: SceneOptions,
    *,
    overwrite: bool = False,
    progress: Callable[[Iterable, str], Iterable] = lambda items, label: items,
) -> bool:
    """Write a data set as ``out/coco`` and ``out/ADEChallengeData2016``.

    Both folders appear only when they are complete; other files in ``out`` are left alone.

    Args:
        out: created if missing. Detectron2 finds the data with ``DETECTRON2_DATASETS=out``.
        options: number and size of the scenes, and the seed.
        overwrite: replace folders of these names that this function did not write.
        progress: wraps the iterable of scene numbers of each split, given it and a label.

    Returns:
        False if ``out`` has the scenes of these options already, else True.

    Raises:
        FileExistsError: one of the two folders exists and was not written by this function.
        NotADirectoryError: ``out`` is a file.

    Example:
        >>> write_scenes("data/scenes", SceneOptions(train=400, val=80))
    """
    out = Path(out)
    if out.exists() and not out.is_dir():
        raise NotADirectoryError(f"{out} is a file; name a folder to write the scenes to")
    folders = (COCO_FOLDER, ADE_FOLDER)
    marker = {"version": _VERSION, **asdict(options)}
    found = read_marker(out)
    if found == {**marker, "complete": True} and all((out / name).is_dir() for name in folders):
        return False
    if found is None and not overwrite:
        for name in folders:
            if (out / name).exists():
                raise FileExistsError(
                    f"{out / name} is there and holds no scenes made by this tool; "
                    "name another folder, or pass --overwrite to replace it"
                )

    staging = out / _STAGING
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    try:
        first_id = 1
        for split, count in (("train", options.train), ("val", options.val)):
            scenes = progress(range(count), split)
            _write_split(staging, split, scenes, options, first_id)
            first_id += count
        # The marker is first: after a kill in this loop, the next run may replace both folders.
        files.write(out / MARKER, json.dumps({**marker, "complete": False}))
        for name in folders:
            if (out / name).is_dir() and not (out / name).is_symlink():
                shutil.rmtree(out / name)
            else:
                (out / name).unlink(missing_ok=True)
            os.replace(staging / name, out / name)
        files.write(out / MARKER, json.dumps({**marker, "complete": True}))
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return True


def read_marker(out: str | os.PathLike) -> dict | None:
    """The options that :func:`write_scenes` saved in a folder, or None."""
    try:
        return json.loads((Path(out) / MARKER).read_text())
    except (FileNotFoundError, NotADirectoryError, json.JSONDecodeError):
        return None


def _write_split(
    root: Path, split: str, numbers: Iterable[int], options: SceneOptions, first_id: int
) -> None:
    from PIL import Image

    long_name = {"train": "training", "val": "validation"}[split]
    coco = root / COCO_FOLDER
    ade = root / ADE_FOLDER
    coco_images = coco / f"{split}2017"
    ade_images, ade_masks = (ade / kind / long_name for kind in ("images", "annotations"))
    for folder in (coco_images, coco / "annotations", ade_images, ade_masks):
        folder.mkdir(parents=True, exist_ok=True)

    images, annotations = [], []
    for number in numbers:
        rng = np.random.default_rng([options.seed, ("train", "val").index(split), number])
        scene = draw_scene(rng, options.size)
        image_id = first_id + number
        file_name = f"{image_id:012d}.jpg"
        ade_name = f"ADE_{split}_{number + 1:08d}"
        Image.fromarray(scene.image).save(coco_images / file_name, quality=92, subsampling=0)
        shutil.copyfile(coco_images / file_name, ade_images / f"{ade_name}.jpg")
        Image.fromarray(scene.labels()).save(ade_masks / f"{ade_name}.png")
        images.append(
            {"id": image_id, "file_name": file_name, "height": options.size, "width": options.size}
        )
        for index, (mask, shape) in enumerate(zip(scene.masks, scene.classes, strict=True)):
            ids = {"id": 10 * image_id + index, "image_id": image_id, "category_id": shape + 1}
            annotations.append(_annotation(mask, **ids))

    about = {"description": "Generated scenes", "version": str(_VERSION), **asdict(options)}
    content = {
        "info": about,
        "licenses": [],
        "images": images,
        "annotations": annotations,
        "categories": [
            {"id": number, "name": name, "supercategory": "shape"}
            for number, name in enumerate(SHAPES, start=1)
        ],
    }
    files.write(coco / "annotations" / f"instances_{split}2017.json", json.dumps(content))
