"""Generated scenes with known truth, in the folder layouts of COCO and ADE20K.

A scene is one to three large shapes on a plain background. The texture goes with the class (discs
are striped, boxes chequered, triangles dotted) and the contrast is enforced, so that a very small
network learns them on a CPU in minutes: enough to prove that the way from a folder of photos to a
trained detector or segmentor is whole, and nothing more.
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
    """What decides every byte of a set of scenes.

    Attributes:
        train: number of training scenes.
        val: number of held-out scenes.
        size: side of the square scenes, in pixels.
        seed: the random seed; a scene depends on it, its split and its number alone, so that more
            scenes of one seed begin with the same ones.
    """

    train: int = 400
    val: int = 80
    size: int = 160
    seed: int = 0

    def __post_init__(self) -> None:
        for name, low, high in (
            ("train", 1, 999_999),
            ("val", 1, 999_999),
            ("size", 64, 2048),
            ("seed", 0, 2**32 - 1),
        ):
            value = getattr(self, name)
            if not low <= value <= high:
                raise ValueError(f"{name} is {value}; it must be between {low} and {high}")


@dataclass(frozen=True)
class Scene:
    """One picture and its truth.

    Attributes:
        image: ``(H, W, 3)`` uint8, RGB.
        masks: ``(N, H, W)`` bool, the visible part of each shape; no two overlap.
        classes: N indices into :data:`SHAPES`.
    """

    image: np.ndarray
    masks: np.ndarray
    classes: tuple[int, ...]

    def labels(self) -> np.ndarray:
        """``(H, W)`` uint8 in ADE20K's numbering: 0 = other (unused here), 1 = background, 2 on =
        :data:`SHAPES`."""
        labels = np.ones(self.image.shape[:2], np.uint8)
        for mask, shape in zip(self.masks, self.classes, strict=True):
            labels[mask] = 2 + shape
        return labels


def draw_scene(rng: np.random.Generator, size: int) -> Scene:
    """Draw one scene of ``size`` x ``size`` pixels with one to three shapes.

    Later shapes hide earlier ones. A layout in which a shape would be mostly hidden, or would
    surround another one (COCO's polygons cannot say "hole"), is drawn again.
    """
    background = rng.uniform(20, 235, 3)
    wanted = int(rng.integers(1, 4))
    while True:
        shapes = [(int(rng.integers(len(SHAPES))), _outline(rng, size)) for _ in range(wanted)]
        full = np.stack([_inside(SHAPES[kind], outline, size) for kind, outline in shapes])
        visible = full.copy()
        for lower in range(wanted - 1):
            visible[lower] &= ~full[lower + 1 :].any(axis=0)
        if all(_usable(*pair) for pair in zip(visible, full, strict=True)):
            break

    image = np.broadcast_to(background, (size, size, 3)).copy()
    for (kind, outline), mask in zip(shapes, visible, strict=True):
        light, dark = _colours(rng, background)
        pattern = _texture(SHAPES[kind], outline, size)[..., None]
        image[mask] = np.where(pattern, light, dark)[mask]
    image += rng.normal(0, 4, image.shape)
    return Scene(
        image=image.round().clip(0, 255).astype(np.uint8),
        masks=visible,
        classes=tuple(kind for kind, _ in shapes),
    )


@dataclass(frozen=True)
class _Outline:
    centre: tuple[float, float]
    half: tuple[float, float]
    angle: float


def _outline(rng: np.random.Generator, size: int) -> _Outline:
    half = rng.uniform(0.18, 0.28, 2) * size
    margin = half.max()
    return _Outline(
        centre=tuple(rng.uniform(margin, size - margin, 2)),
        half=tuple(half),
        angle=rng.uniform(0, 2 * np.pi),
    )


def _own_axes(outline: _Outline, size: int) -> tuple[np.ndarray, np.ndarray]:
    """The pixels' centres in the shape's own turned axes, in pixels from its centre."""
    y, x = np.mgrid[:size, :size] + 0.5
    x, y = x - outline.centre[0], y - outline.centre[1]
    cos, sin = np.cos(outline.angle), np.sin(outline.angle)
    return cos * x + sin * y, cos * y - sin * x


def _inside(shape: str, outline: _Outline, size: int) -> np.ndarray:
    u, v = _own_axes(outline, size)
    u, v = u / outline.half[0], v / outline.half[1]
    if shape == "disc":
        return u**2 + v**2 <= 1
    if shape == "box":
        return np.maximum(abs(u), abs(v)) <= 0.85
    return (v <= 0.8) & (v >= 2 * abs(u) - 1)


def _texture(shape: str, outline: _Outline, size: int) -> np.ndarray:
    """Where the lighter colour goes: ``(size, size)`` bool. Fine stripes, coarse squares, dots."""
    u, v = (axis / size for axis in _own_axes(outline, size))
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
    """Two colours that differ in luminance from each other, one of them also from the ground."""
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
    """Outline a mask without holes as COCO's polygons, which pycocotools turns back into exactly
    that mask.

    Contours run through the middle of pixels, which would lose half a pixel all around; on the
    doubled mask they run a quarter of a pixel inside the border and enclose every pixel's centre.

    Args:
        mask: ``(H, W)`` bool.

    Returns:
        One flat ``[x, y, x, y, ...]`` list in pixels for each connected part.
    """
    import cv2

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
    """Write one set of scenes as ``out/coco`` and ``out/ADEChallengeData2016``.

    The same options give the same files, bit for bit. Both folders appear only when they are
    whole; other files in ``out`` are left alone.

    Args:
        out: folder to write to; made when missing. As ``DETECTRON2_DATASETS`` it is found by
            Detectron2.
        options: how many, how large, which seed.
        overwrite: replace ``coco`` and ``ADEChallengeData2016`` that this function did not make.
        progress: wraps the loop over each split, given the items and a label.

    Returns:
        Whether anything was written: False when these very scenes are there already.

    Raises:
        FileExistsError: one of the two folders is there and was not made here.
        NotADirectoryError: ``out`` is a file.
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
        # From here on the folders are ours, also for a run that comes after a kill.
        files.write(out / MARKER, json.dumps({**marker, "complete": False}))
        for name in folders:
            _remove(out / name)
            os.replace(staging / name, out / name)
        files.write(out / MARKER, json.dumps({**marker, "complete": True}))
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return True


def read_marker(out: str | os.PathLike) -> dict | None:
    """What :func:`write_scenes` noted about a folder; None where it has not been."""
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

    files.write(
        coco / "annotations" / f"instances_{split}2017.json",
        json.dumps(
            {
                "info": {
                    "description": "Generated scenes",
                    "version": str(_VERSION),
                    **asdict(options),
                },
                "licenses": [],
                "images": images,
                "annotations": annotations,
                "categories": [
                    {"id": number, "name": name, "supercategory": "shape"}
                    for number, name in enumerate(SHAPES, start=1)
                ],
            }
        ),
    )


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
