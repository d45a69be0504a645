"""What a detector's training would see, for :mod:`dense.browsing`."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from detectron2.config import instantiate
from detectron2.data import detection_utils as utils
from detectron2.structures import BitMasks, BoxMode, Instances, PolygonMasks
from detectron2.structures.masks import polygons_to_bitmask
from omegaconf import DictConfig
from PIL import Image
from tqdm import tqdm

from dense import browsing, drawing, page
from dense.browsing import Split
from dense.detection import annotations
from dense.detection.data import resolve_data
from dense.images import UnreadableImage, read_image
from dense.seeding import seeded
from dense.waiting import waiting

# Pixels of the longer side at which samples are drawn.
DRAWN = 640
# Names of more objects would cover each other in a thumbnail; their colours tell them apart.
NAMED = 6


def splits(
    cfg: DictConfig, images: int, check: int, seed: int
) -> tuple[list[Split], drawing.Colours]:
    """Training and validation data of a config, with the colours of the classes.

    Entries of own data that cannot be trained on are listed, and left out by ``allow_invalid``.

    Args:
        cfg: as ``tools/train_detector.py`` has it before ``resolve_data``; changed in place.
        images: how many samples are drawn, at most.
        check: how many photos are decoded, at most.
        seed: which ones, and how they are augmented.

    Raises:
        DataError: the data is missing or of another format.
    """
    data = cfg.get("data") or {}
    cfg.data = {**data, "allow_invalid": True}
    with waiting("reading the annotations"):
        resolve_data(cfg, training=True)
    names = list(cfg.dataloader.metadata.classes)
    colours = dict(zip(names, drawing.class_colours(len(names)), strict=True))
    found = []
    for name, loader, key in (("training", "train", "train"), ("validation", "test", "val")):
        own = bool(data.get("train_json"))
        if name == "validation" and "evaluator" not in cfg.dataloader:
            continue
        with waiting(f"reading the {name} annotations"):
            dicts = instantiate(cfg.dataloader[loader].dataset)
        split = _split(name, dicts, names, check, seed)
        if own:
            content = json.loads(Path(data[f"{key}_json"]).read_text())
            faults = annotations.faults(content, data[f"{key}_images"])
            split.odd = [f"{fault.name}: {fault.reason}" for fault in faults]
        found.append(split)
        mapper = instantiate(cfg.dataloader.train.mapper) if loader == "train" else None
        wanted = browsing.chosen(len(dicts), images if mapper else images // 2, seed)
        for index in tqdm(wanted, f"drawing {name} samples", delay=2, leave=False):
            with seeded(seed + index):
                picture = _sample(dicts[index], mapper, colours, mapper and mapper.image_format)
            if picture is not None:
                split.samples.append(picture)
        split.about_samples = (
            "Drawn at random, with the config's augmentation: cropped, flipped and resized as "
            "training gets them. Boxes and masks are those that the losses see."
            if mapper
            else "Drawn at random, not augmented, with all annotated objects but crowds."
        )
    return found, colours


def _split(name: str, dicts: list[dict], names: list[str], check: int, seed: int) -> Split:
    split = Split(name, total=len(dicts))
    per_class, images_of = Counter(), Counter()
    sides, crowds, empty = [], 0, 0
    for entry in dicts:
        objects = entry.get("annotations", [])
        kept = [o for o in objects if not o.get("iscrowd", 0)]
        crowds += len(objects) - len(kept)
        empty += not kept
        per_class.update(o["category_id"] for o in kept)
        images_of.update({o["category_id"] for o in kept})
        for o in kept:
            x1, y1, x2, y2 = BoxMode.convert(o["bbox"], o["bbox_mode"], BoxMode.XYXY_ABS)
            sides.append(max(0.0, (x2 - x1) * (y2 - y1)) ** 0.5)
    total = sum(per_class.values())
    split.facts = {
        "photos": len(dicts),
        "objects": total,
        "objects a photo": round(total / max(1, len(dicts)), 2),
        "classes": len(names),
        "crowds, not trained on": crowds,
        "photos without objects": empty,
        "small objects (below 32x32)": sum(s < 32 for s in sides),
        "medium objects": sum(32 <= s < 96 for s in sides),
        "large objects (96x96 and more)": sum(s >= 96 for s in sides),
    }
    most = max(per_class.values(), default=1)
    split.frequencies = page.Table(
        ["class", "objects", "photos"],
        [
            [class_name, page.Cell(per_class[i], share=per_class[i] / most), images_of[i]]
            for i, class_name in enumerate(names)
        ],
    )
    if missing := [class_name for i, class_name in enumerate(names) if not per_class[i]]:
        split.odd.append(f"no {name} object is of {', '.join(missing[:10])}")
    split.histograms = {"object side (root of the area)": sides}
    wanted = browsing.chosen(len(dicts), check, seed)
    split.photos = browsing.look_at(
        browsing.files_of([dicts[i]["file_name"] for i in wanted]), f"reading {name} photos"
    )
    return split


def _sample(
    entry: dict[str, Any], mapper: Any, colours: drawing.Colours, bgr: str | None
) -> page.Picture | None:
    name = Path(entry["file_name"]).name
    try:
        if mapper is None:
            image, instances = truth(entry)
        else:
            packed = mapper(entry)
            if packed is None:
                return None
            image = packed["image"].numpy().transpose(1, 2, 0)
            image = np.ascontiguousarray(image[..., ::-1] if bgr == "BGR" else image)
            instances = packed["instances"]
    except UnreadableImage:
        return None
    height, width = image.shape[:2]
    picture = drawn(image, instances, colours)
    count = len(instances)
    caption = f"{name}: {width}x{height}, {count} object{'' if count == 1 else 's'}"
    return page.Picture(picture, caption, caption)


def truth(entry: dict[str, Any]) -> tuple[np.ndarray, Instances]:
    """The photo of a dataset dict, RGB, and its annotated objects without crowds.

    Raises:
        UnreadableImage: the photo cannot be read.
    """
    image = read_image(entry["file_name"])
    objects = [dict(o) for o in entry.get("annotations", []) if not o.get("iscrowd", 0)]
    has_masks = all(o.get("segmentation") for o in objects)
    for o in objects:
        o["bbox"] = BoxMode.convert(o["bbox"], o["bbox_mode"], BoxMode.XYXY_ABS)
        o["bbox_mode"] = BoxMode.XYXY_ABS
        if not has_masks:
            o.pop("segmentation", None)
    return image, utils.annotations_to_instances(objects, image.shape[:2], mask_format="bitmask")


def drawn(image: np.ndarray, instances: Instances, colours: drawing.Colours) -> np.ndarray:
    """Objects of ``gt_`` fields over an image ``(H, W, 3)``, in the colours of their classes.

    Args:
        image: uint8 RGB; scaled down to :data:`DRAWN` pixels.
        instances: with ``gt_boxes``, ``gt_classes`` and maybe ``gt_masks``.
        colours: by class name, in the classes' order.
    """
    names = list(colours)
    height, width = image.shape[:2]
    factor = min(1.0, DRAWN / max(height, width))
    size = (max(1, round(width * factor)), max(1, round(height * factor)))
    small = np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BILINEAR))
    classes = instances.gt_classes.tolist()
    masks = None
    if instances.has("gt_masks") and len(classes):
        masks = np.stack(
            [
                np.asarray(Image.fromarray(mask).resize(size, Image.Resampling.NEAREST))
                for mask in _bitmaps(instances.gt_masks, height, width)
            ]
        )
    return drawing.draw_instances(
        small,
        instances.gt_boxes.tensor.numpy() * factor,
        masks,
        [names[c] if len(classes) <= NAMED else "" for c in classes],
        [colours[names[c]] for c in classes],
    )


def _bitmaps(masks: PolygonMasks | BitMasks, height: int, width: int) -> list[np.ndarray]:
    if isinstance(masks, BitMasks):
        return list(masks.tensor.numpy())
    return [polygons_to_bitmask(polygons, height, width) for polygons in masks.polygons]
