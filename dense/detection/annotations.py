"""Validation of COCO-style annotations: one pass that finds every entry that cannot be trained on.

>>> found = faults(json.loads(path.read_text()), "train/")
>>> print(described(found, str(path)))
"""

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from dense.images import UnreadableImage, displayed_size

_SHOWN = 10
# Annotators round outwards, by less than a pixel.
_MARGIN = 1.0


class Fault(NamedTuple):
    """An entry that cannot be used.

    Attributes:
        kind: ``"image"`` or ``"annotation"``.
        index: its place in the JSON's list.
        name: what the message calls it, such as ``"annotation 7"``.
        reason: the field, its value and what would be right.
    """

    kind: str
    index: int
    name: str
    reason: str


def faults(content: Mapping[str, Any], folder: str | Path) -> list[Fault]:
    """Every image and annotation of a COCO-style JSON that cannot be used.

    An image needs a unique id, a file that can be opened, and the width and height of that photo as
    it is displayed (rotated by its EXIF orientation), since Detectron2 rotates it. An annotation
    needs a unique id, an image and a category of the JSON, a box ``[x, y, w, h]`` of finite numbers
    with w and h above 0, inside of the image to a pixel, and, if it has a segmentation, polygons of
    at least three points with an area, inside of the image to a pixel, or an RLE of the image's
    size.

    Args:
        content: the parsed JSON with the lists ``images``, ``annotations`` and ``categories``.
        folder: the images' folder.

    Returns:
        The first fault of each entry, images first.
    """
    images, annotations = content["images"], content["annotations"]
    ids = Counter(_id(image) for image in images)
    mixed = _mixed(ids)

    def of_image(entry: Any) -> str | None:
        return _of_entry(entry, ids, mixed) or _of_image(entry, Path(folder))

    with ThreadPoolExecutor() as pool:
        opened = pool.map(of_image, images)
        reasons = list(tqdm(opened, "checking images", len(images), delay=2, leave=False))
    found = [
        Fault("image", index, f"image {_shown(_id(image))}", reason)
        for index, (image, reason) in enumerate(zip(images, reasons, strict=True))
        if reason
    ]
    sizes = {
        _id(image): (image["width"], image["height"])
        for image, reason in zip(images, reasons, strict=True)
        if not reason
    }
    categories = {_hashable(category.get("id")) for category in content["categories"]}
    ids_of_annotations = Counter(_id(annotation) for annotation in annotations)
    mixed = _mixed(ids_of_annotations)
    for index, annotation in enumerate(annotations):
        reason = _of_entry(annotation, ids_of_annotations, mixed) or _of_annotation(
            annotation, ids, sizes, categories
        )
        if reason:
            name = f"annotation {_shown(_id(annotation))}"
            found.append(Fault("annotation", index, name, reason))
    return found


def described(found: Sequence[Fault], json_file: str) -> str:
    """One line: how many entries cannot be used, and the first ten with their reasons."""
    counts = Counter(fault.kind for fault in found)
    many = " and ".join(f"{n} {kind}{'s' if n > 1 else ''}" for kind, n in counts.items())
    first = "; ".join(f"{fault.name}: {fault.reason}" for fault in found[:_SHOWN])
    more = f"; and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
    return f"{json_file}: {many} cannot be used: {first}{more}"


def without(content: Mapping[str, Any], found: Sequence[Fault]) -> dict[str, Any]:
    """The JSON without the faulty entries, and without the annotations of faulty images."""
    dropped = {(fault.kind, fault.index) for fault in found}
    images = [i for n, i in enumerate(content["images"]) if ("image", n) not in dropped]
    kept = {image["id"] for image in images}
    annotations = [
        annotation
        for n, annotation in enumerate(content["annotations"])
        if ("annotation", n) not in dropped and annotation["image_id"] in kept
    ]
    return {**content, "images": images, "annotations": annotations}


def _of_entry(entry: Any, ids: Counter, mixed: str | None) -> str | None:
    if not isinstance(entry, dict):
        return f"{_shown(entry)} is not an object"
    if entry.get("id") is None:
        return "it has no id"
    if mixed:
        return mixed
    if not isinstance(entry["id"], int | str) or isinstance(entry["id"], bool):
        return f"id={_shown(entry['id'])}: a whole number is needed"
    if ids[_id(entry)] > 1:
        return f"id={_shown(entry['id'])} is there {ids[_id(entry)]} times"
    return None


def _of_image(image: dict, folder: Path) -> str | None:
    name = image.get("file_name")
    if not isinstance(name, str) or not name:
        return f"file_name={_shown(name)}: a path below {folder} is needed"
    for key in ("width", "height"):
        value = image.get(key)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            return f"{key}={_shown(value)}: the photo's pixels are needed"
    path = folder / name
    if not path.is_file():
        return f"file_name={name!r}: there is no {path}"
    try:
        raw, shown = displayed_size(path)
    except UnreadableImage as error:
        return f"file_name={name!r}: {error}"
    said = (image["width"], image["height"])
    if said != shown:
        turned = " (turned by its EXIF orientation)" if raw != shown else ""
        return f"width, height={said[0]}, {said[1]}: {name} is {shown[0]}x{shown[1]}{turned}"
    return None


def _of_annotation(a: dict, images: Counter, sizes: Mapping, categories: set) -> str | None:
    image = _hashable(a.get("image_id"))
    if image not in images:
        return f"image_id={_shown(a.get('image_id'))} is of no listed image"
    if _hashable(a.get("category_id")) not in categories:
        return f"category_id={_shown(a.get('category_id'))} is of no listed category"
    if a.get("iscrowd", 0) not in (0, 1):
        return f"iscrowd={_shown(a['iscrowd'])}: 0 or 1 is needed"
    if image not in sizes:
        return None  # The image is faulty, and the annotation goes with it.
    return _of_box(a.get("bbox"), *sizes[image]) or _of_segmentation(
        a.get("segmentation"), *sizes[image]
    )


def _of_box(box: Any, width: int, height: int) -> str | None:
    if not isinstance(box, list) or len(box) != 4 or not all(map(_is_finite, box)):
        return f"bbox={_shown(box)}: four finite numbers [x, y, w, h] are needed"
    x, y, w, h = box
    if w <= 0 or h <= 0:
        return f"bbox={_shown(box)}: w and h above 0 are needed"
    if not _inside((x, x + w), width) or not _inside((y, y + h), height):
        return f"bbox={_shown(box)} leaves the {width}x{height} pixels of its image"
    return None


def _of_segmentation(value: Any, width: int, height: int) -> str | None:
    if not value:
        return None
    if isinstance(value, dict):
        return _of_rle(value, width, height)
    if not isinstance(value, list) or not all(isinstance(part, list) for part in value):
        return f"segmentation={_shown(value)}: a list of polygons, or an RLE, is needed"
    for polygon in value:
        if len(polygon) < 6 or len(polygon) % 2 or not all(map(_is_finite, polygon)):
            return (
                f"segmentation has the polygon {_shown(polygon)}: x and y of at least three points "
                "are needed, finite numbers"
            )
        xs, ys = polygon[::2], polygon[1::2]
        if _area(xs, ys) < 1e-6:
            return f"segmentation has the polygon {_shown(polygon)}, which has no area"
        if not _inside(xs, width) or not _inside(ys, height):
            return (
                f"segmentation has the polygon {_shown(polygon)}, which leaves the "
                f"{width}x{height} pixels of its image"
            )
    return None


def _of_rle(rle: dict, width: int, height: int) -> str | None:
    size, counts = rle.get("size"), rle.get("counts")
    if size != [height, width]:
        return f"segmentation.size={_shown(size)}: [{height}, {width}] of its image is needed"
    if isinstance(counts, str):
        runs = list(_decoded(counts))
    elif isinstance(counts, list) and all(isinstance(n, int) for n in counts):
        runs = counts
    else:
        return f"segmentation.counts={_shown(counts)}: a list of runs, or COCO's text, is needed"
    if any(run < 0 for run in runs) or sum(runs) != height * width:
        return (
            f"segmentation.counts covers {sum(runs)} pixels, of {height * width} in "
            f"{height}x{width}"
        )
    return None


def _decoded(text: str) -> Iterator[int]:
    """Run lengths of COCO's compressed RLE: five bits a character, differences from the third on.

    pycocotools' decoder writes beyond its memory for some texts, so it is not asked.
    """
    runs: list[int] = []
    value = shift = 0
    for character in text:
        bits = ord(character) - 48
        value |= (bits & 0x1F) << shift
        shift += 5
        if not bits & 0x20:
            if bits & 0x10:
                value -= 1 << shift
            runs.append(value + (runs[-2] if len(runs) > 2 else 0))
            value = shift = 0
    # A text that ends inside a number has no valid sum.
    yield from runs if not shift else [-1]


def _inside(values: Sequence[float], size: int) -> bool:
    return min(values) >= -_MARGIN and max(values) <= size + _MARGIN


def _area(xs: Sequence[float], ys: Sequence[float]) -> float:
    pairs = zip(xs, ys, [*xs[1:], xs[0]], [*ys[1:], ys[0]], strict=True)
    return abs(sum(x * next_y - next_x * y for x, y, next_x, next_y in pairs)) / 2


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _id(entry: Any) -> Any:
    return _hashable(entry.get("id")) if isinstance(entry, dict) else None


def _hashable(value: Any) -> Any:
    return value if isinstance(value, int | float | str | None) else repr(value)


def _mixed(ids: Counter) -> str | None:
    kinds = {type(value) for value in ids if value is not None}
    if kinds != {int, str}:
        return None
    counts = Counter(type(value).__name__ for value in ids.elements() if value is not None)
    return f"ids are mixed, {counts['int']} numbers and {counts['str']} texts: one type is needed"


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) < 60 else f"{text[:57]}..."
