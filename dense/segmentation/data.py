"""Finds and checks pairs of images and masks on disk."""

import contextlib
import hashlib
import json
import logging
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image
from tqdm import tqdm

from dense import files
from dense.images import UnreadableImage, displayed_size
from dense.openmmlab.config import ConfigError

_logger = logging.getLogger(__name__)

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp")
# Of masks, in place of the image's; the first that exists is taken.
MASK_SUFFIXES = (
    *(".png", ".tif", ".tiff", "_mask.png", "_mask.tif", "_labelTrainIds.png"),
    "_gtFine_labelTrainIds.png",
)
_CITYSCAPES_IMAGE = "_leftImg8bit"
_INDEX_MODES = ("1", "L", "P", "I", "I;16")


def image_mask_pairs(
    images: Path,
    masks: Path,
    suffixes: Sequence[str] = IMAGE_SUFFIXES,
    mask_suffixes: Sequence[str] = MASK_SUFFIXES,
) -> list[tuple[Path, Path]]:
    """Sorted pairs of every image in a folder and the mask of the same relative name.

    Args:
        images: the folder of images, searched recursively.
        masks: the folder of masks, with the same subfolders; it may be that of the images, where
            names with one of ``mask_suffixes`` beginning with ``_`` are masks.
        suffixes: suffixes of image files, case-insensitive.
        mask_suffixes: the suffixes that may replace it in the mask's name. Cityscapes' images lose
            ``_leftImg8bit`` too. Where no mask exists, the first is taken.
    """
    suffixes = tuple(suffix.lower() for suffix in suffixes)
    added = tuple(suffix for suffix in mask_suffixes if suffix.startswith("_"))
    together = images.resolve() == masks.resolve()
    pairs = []
    for folder, _, names in os.walk(images, followlinks=True):
        beside = masks / Path(folder).relative_to(images)
        there = {path.name for path in beside.iterdir()} if beside.is_dir() else set()
        for name in names:
            suffix = next((s for s in suffixes if name.lower().endswith(s)), None)
            if suffix is None or (together and name.endswith(added)):
                continue
            stem = name[: -len(suffix)]
            stems = dict.fromkeys((stem, stem.removesuffix(_CITYSCAPES_IMAGE)))
            called = [f"{each}{ending}" for each in stems for ending in mask_suffixes]
            # Where images and masks lie together, an image is not its own mask.
            taken = {name} if together else set()
            mask = next((c for c in called if c in there - taken), called[0])
            pairs.append((Path(folder, name), beside / mask))
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
    suffixes, mask_suffixes = IMAGE_SUFFIXES, MASK_SUFFIXES
    if dataset.type != "FolderDataset":
        suffixes = (dataset.get("img_suffix", ".jpg"),)
        mask_suffixes = (dataset.get("seg_map_suffix", ".png"),)
    pairs = image_mask_pairs(images, masks, suffixes, mask_suffixes)
    if not pairs:
        raise ConfigError(f"no images in {images} ({place}) with a suffix of {' '.join(suffixes)}")
    if without := [pair for pair in pairs if not pair[1].is_file()]:
        image, mask = without[0]
        others = ""
        if dataset.type == "FolderDataset":
            others = f"; other endings that are found: {', '.join(MASK_SUFFIXES[1:])}"
        raise ConfigError(
            f"{image} has no mask {mask} ({len(without)} of {len(pairs)} have none){others}"
        )
    return pairs


def check_masks(
    pairs: Sequence[tuple[Path, Path]],
    classes: Sequence[str],
    ignore_index: int = 255,
    reduce_zero_label: bool = False,
    palette: Sequence[Sequence[int]] | None = None,
) -> None:
    """Check every mask: class index per pixel, size of the image; log what is odd.

    What a mask holds is cached by its size and time, in the user's cache folder.

    Args:
        pairs: images and masks.
        classes: names, by index.
        ignore_index: a value to ignore besides 255.
        reduce_zero_label: True ignores 0 and numbers the classes from 1.
        palette: masks are pictures in these colours ``(R, G, B)``: those of the classes, then
            those to ignore. None: they hold class indices.

    Raises:
        ConfigError: masks are unusable; the message names the first one and how many there are.
    """
    first = int(reduce_zero_label)
    ignored = {ignore_index, 255, *([0] if first else [])}
    indices = set(range(first, first + len(classes))) - ignored
    if palette:
        codes = [colour_code(colour) for colour in palette]
        ignored = set(codes[len(classes) :])
        indices = set(codes[: len(classes)])
    masks = [mask for _, mask in pairs]
    if twice := sorted(mask for mask, n in Counter(masks).items() if n > 1):
        images = ", ".join(str(image) for image, mask in pairs if mask == twice[0])
        raise ConfigError(f"{images} share the mask {twice[0]}: give each image a name of its own")

    with _cached_contents(masks) as held:

        def fault(pair: tuple[Path, Path]) -> str | tuple[int, ...]:
            wrong = _fault(*pair, held, indices | ignored, bool(palette))
            return wrong or held[pair[1]].values

        with ThreadPoolExecutor() as pool:
            found = list(
                tqdm(pool.map(fault, pairs), "checking masks", len(pairs), delay=2, leave=False)
            )
    if faults := [reason for reason in found if isinstance(reason, str)]:
        more = f" ({len(faults)} of {len(pairs)} masks cannot be used)" if len(faults) > 1 else ""
        said = "" if palette else _said(found, indices | ignored, classes, first)
        raise ConfigError(faults[0] + said + more)
    present = set().union(*found)
    if not present & indices:
        raise ConfigError(f"all pixels of the {len(pairs)} masks in {masks[0].parent} are ignored")
    empty = [mask for mask, values in zip(masks, found, strict=True) if not set(values) & indices]
    if empty:
        _logger.warning(f"{len(empty)} masks have ignored pixels only, such as {empty[0]}")
    numbers = {code: place for place, code in enumerate(codes)} if palette else {}
    absent = [classes[numbers.get(index, index - first)] for index in sorted(indices - present)]
    if absent:
        names = ", ".join(absent[:10]) + (", ..." if len(absent) > 10 else "")
        _logger.warning(
            f"no pixel in {masks[0].parent} is of {names}: {len(absent)} of {len(classes)} classes"
        )


def check_overlap(train: Sequence[tuple[Path, Path]], val: Sequence[tuple[Path, Path]]) -> None:
    """Log how many validation images are training images too, by their path."""
    seen = {image.resolve() for image, _ in train}
    both = [image for image, _ in val if image.resolve() in seen]
    if both:
        _logger.warning(
            f"{len(both)} of {len(val)} validation images are training images too, such as "
            f"{both[0]}: their mIoU says nothing about other photos"
        )


def colour_code(colour: Sequence[int]) -> int:
    """A colour ``(R, G, B)`` as one number of 24 bits."""
    red, green, blue = colour
    return red << 16 | green << 8 | blue


class _Content(NamedTuple):
    """What a mask file holds: size in bytes, time in ns, mode, width, height, values.

    The values of a coloured file are its colours, as :func:`colour_code`.
    """

    bytes: int
    time: int
    mode: str
    width: int
    height: int
    values: tuple[int, ...]


@contextlib.contextmanager
def _cached_contents(masks: Sequence[Path]) -> Iterator[dict[Path, _Content]]:
    """What is known of masks, kept for the next run; entries of changed files are left out."""
    name = hashlib.sha256("\n".join(sorted({str(m.parent.resolve()) for m in masks})).encode())
    home = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"))
    cache = home / "dense-backbones/masks-2" / f"{name.hexdigest()[:16]}.json"
    known = {}
    # A cache that cannot be read costs time, nothing else.
    with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
        for path, entry in json.loads(cache.read_text()).items():
            known[Path(path)] = _Content(*entry[:-1], tuple(entry[-1]))
    held = {mask: known[mask] for mask in masks if mask in known and _is_current(mask, known[mask])}
    yield held
    if held == known:
        return
    try:
        cache.parent.mkdir(parents=True, exist_ok=True)
        files.write(cache, json.dumps({str(mask): entry for mask, entry in held.items()}))
    except OSError as error:
        _logger.warning(f"the next run reads all masks again, as {cache} is not written: {error}")


def _is_current(mask: Path, content: _Content) -> bool:
    try:
        stat = mask.stat()
    except OSError:
        return False
    return (stat.st_size, stat.st_mtime_ns) == (content.bytes, content.time)


def _fault(
    image: Path, mask: Path, held: dict[Path, _Content], valid: set[int], coloured: bool
) -> str | None:
    """Why a mask cannot be used; fills ``held``."""
    try:
        _, size = displayed_size(image)
    except UnreadableImage as error:
        return str(error)
    if mask not in held:
        try:
            stat = mask.stat()
            with Image.open(mask) as opened:
                values = tuple(np.unique(_values(opened)).tolist())
                held[mask] = _Content(
                    stat.st_size, stat.st_mtime_ns, opened.mode, *opened.size, values
                )
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            return f"{mask} cannot be read: {error}"
    content = held[mask]
    if coloured and content.mode != "RGB":
        return f"{mask} is {content.mode}: colours of --classes are of RGB masks"
    if not coloured and content.mode == "RGB":
        return (
            f"{mask} is RGB: one class index per pixel is needed, a grey or palette PNG. If its "
            "colours are classes, --classes FILE takes a line NAME R G B for each, and - R G B to "
            f"ignore one; it holds {_colours(content.values)}"
        )
    if not coloured and content.mode not in _INDEX_MODES:
        return (
            f"{mask} is {content.mode}: one class index per pixel is needed, a grey or palette PNG"
        )
    if size != (content.width, content.height):
        return f"{mask} is {content.width}x{content.height}, its image {size[0]}x{size[1]}"
    wrong = sorted(set(content.values) - valid)
    if wrong and coloured:
        return f"{mask} holds {_colours(wrong)}, of no line of --classes"
    if wrong:
        return f"{mask} holds {', '.join(map(str, wrong[:5]))}"
    return None


def _values(mask: Image.Image) -> np.ndarray:
    pixels = np.asarray(mask)
    if mask.mode != "RGB":
        return pixels
    return pixels.astype(np.int32) @ np.array([1 << 16, 1 << 8, 1], np.int32)


def _colours(codes: Sequence[int]) -> str:
    """Colours for a message, five at most."""
    shown = [f"{code >> 16} {code >> 8 & 255} {code & 255}" for code in codes[:5]]
    return ", ".join(shown) + (f" and {len(codes) - 5} more" if len(codes) > 5 else "")


def _said(found: list, valid: set[int], classes: Sequence[str], first: int) -> str:
    """What the values of masks should be, if the first fault is one of values."""
    faults = [reason for reason in found if isinstance(reason, str)]
    if " holds " not in faults[0]:
        return ""
    ignored = sorted(valid - set(range(first, first + len(classes))))
    wrong = {reason.rpartition(" holds ")[2] for reason in faults if " holds " in reason}
    text = (
        f": {len(classes)} classes are {first} to {first + len(classes) - 1}, and "
        f"{', '.join(map(str, ignored))} {'is' if len(ignored) == 1 else 'are'} ignored"
    )
    if len(wrong) == 1 and (value := wrong.pop()).isdigit():
        text += f"; if {value} marks pixels to ignore, --ignore-index {value} says so"
    return text
