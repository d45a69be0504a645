"""Finds and checks pairs of images and masks on disk."""

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

from dense.openmmlab.config import ConfigError

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp")
MASK_SUFFIX = ".png"
# check_masks reads about this many masks (up to twice as many), evenly spaced.
_CHECKED = 500
_INDEX_MODES = ("1", "L", "P", "I", "I;16")


def image_mask_pairs(
    images: Path, masks: Path, suffixes: Sequence[str] = IMAGE_SUFFIXES, mask_suffix=MASK_SUFFIX
) -> list[tuple[Path, Path]]:
    """Sorted pairs of every image in a folder and the mask of the same relative name.

    Args:
        images: the folder of images, searched recursively.
        masks: the folder of masks, with the same subfolders. The masks need not exist.
        suffixes: suffixes of image files, case-insensitive.
        mask_suffix: the suffix that replaces it in the mask's name.
    """
    suffixes = tuple(suffix.lower() for suffix in suffixes)
    pairs = []
    for folder, _, names in os.walk(images, followlinks=True):
        for name in names:
            if suffix := next((s for s in suffixes if name.lower().endswith(s)), None):
                stem = name[: -len(suffix)]
                mask = masks / Path(folder).relative_to(images) / f"{stem}{mask_suffix}"
                pairs.append((Path(folder, name), mask))
    return sorted(pairs)


def check_folders(dataset: Any, place: str) -> list[tuple[Path, Path]]:
    """Check that a data set's folders exist and that every image has a mask.

    Args:
        dataset: the config of a data set, with MMSegmentation's keys.
        place: its place in the config, for messages.

    Returns:
        The pairs of image and mask; empty for a data set without ``data_prefix`` or with an
        ``ann_file``.

    Raises:
        ConfigError: a folder or mask is missing, or there are no images.
    """
    prefix = dataset.get("data_prefix")
    if prefix is None:
        return []
    root = dataset.get("data_root")
    folders = []
    for key in ("img_path", "seg_map_path"):
        folder = Path(root or "", prefix.get(key) or "")
        if not folder.is_dir():
            hint = f": data_root is {root!r}, --data-root names another" if root else ""
            raise ConfigError(f"no folder {folder} ({place}){hint}")
        folders.append(folder)
    if dataset.get("ann_file"):
        return []
    images, masks = folders
    suffixes = IMAGE_SUFFIXES
    if dataset.type != "FolderDataset":
        suffixes = (dataset.get("img_suffix", ".jpg"),)
    pairs = image_mask_pairs(images, masks, suffixes, dataset.get("seg_map_suffix", MASK_SUFFIX))
    if not pairs:
        raise ConfigError(f"no images in {images} ({place}) with a suffix of {' '.join(suffixes)}")
    if without := [pair for pair in pairs if not pair[1].is_file()]:
        image, mask = without[0]
        raise ConfigError(f"{image} has no mask {mask} ({len(without)} of {len(pairs)} have none)")
    return pairs


def check_masks(
    pairs: Sequence[tuple[Path, Path]],
    classes: Sequence[str],
    ignore_index: int = 255,
    reduce_zero_label: bool = False,
) -> None:
    """Check up to 1000 evenly spaced masks: class index per pixel, size of the image.

    Args:
        pairs: images and masks.
        classes: names, by index.
        ignore_index: a value to ignore besides 255.
        reduce_zero_label: True ignores 0 and numbers the classes from 1.

    Raises:
        ConfigError: a mask is unusable; the message names the first one and the reason.
    """
    first = int(reduce_zero_label)
    valid = {*range(first, first + len(classes)), ignore_index, 255, *([0] if first else [])}
    step = max(1, len(pairs) // _CHECKED)

    def fault(pair: tuple[Path, Path]) -> str | None:
        image, mask = pair
        try:
            with Image.open(path := image) as opened:
                size = _displayed_size(opened)
            with Image.open(path := mask) as opened:
                mode, mask_size = opened.mode, opened.size
                values = set(np.unique(np.asarray(opened)).tolist())
        except (UnidentifiedImageError, OSError) as error:
            return f"{path} cannot be read: {error}"
        if mode not in _INDEX_MODES:
            return f"{mask} is {mode}: one class index per pixel is needed, a grey or palette PNG"
        if size != mask_size:
            return f"{mask} is {mask_size[0]}x{mask_size[1]}, its image {size[0]}x{size[1]}"
        if wrong := sorted(values - valid):
            return (
                f"{mask} holds {', '.join(map(str, wrong[:5]))}: {len(classes)} classes are "
                f"{first} to {first + len(classes) - 1}, and {ignore_index} is ignored"
            )
        return None

    with ThreadPoolExecutor() as pool:
        for found in pool.map(fault, pairs[::step]):
            if found:
                raise ConfigError(found)


def _displayed_size(image: Image.Image) -> tuple[int, int]:
    """Width and height after EXIF rotation, which OpenCV applies on reading."""
    width, height = image.size
    turned = image.getexif().get(ExifTags.Base.Orientation, 1) >= 5
    return (height, width) if turned else (width, height)
