"""What a segmentor's training would see, for :mod:`dense.browsing`."""

from pathlib import Path
from typing import Any

import numpy as np
from mmengine.config import Config
from mmengine.registry import init_default_scope
from mmseg.registry import DATASETS, TRANSFORMS
from mmseg.utils import register_all_modules
from tqdm import tqdm

from dense import browsing, drawing, page
from dense.browsing import Split
from dense.images import UnreadableImage
from dense.seeding import seeded
from dense.segmentation.config import pipeline_of
from dense.segmentation.data import check_folders
from dense.waiting import waiting

IGNORED = 255
_READS_MASKS = ("LoadAnnotations", "mmseg.LoadAnnotations", "ReadColouredMask")


def splits(cfg: Config, images: int, check: int, seed: int) -> tuple[list[Split], drawing.Colours]:
    """Training and validation data of a config, with the colours of the classes.

    Args:
        cfg: as ``tools/train_segmentor.py`` has it before its data is checked.
        images: how many samples are drawn, at most.
        check: how many photos and masks are read, at most.
        seed: which ones, and how they are augmented.

    Raises:
        ConfigError: a folder or a mask is missing.
    """
    register_all_modules(init_default_scope=False)
    init_default_scope(cfg.get("default_scope", "mmseg"))
    found = []
    for name, loader in (("training", "train_dataloader"), ("validation", "val_dataloader")):
        check_folders(cfg[loader].dataset, loader)
        with waiting(f"listing the {name} photos"):
            dataset = DATASETS.build(cfg[loader].dataset)
        classes = list(dataset.metainfo["classes"])
        palette = dataset.metainfo.get("palette") or drawing.class_colours(len(classes))
        colours = {c: tuple(map(int, p)) for c, p in zip(classes, palette, strict=True)}
        read = mask_reader(cfg[loader].dataset)
        split = _split(name, dataset, classes, read, check, seed)
        draw = drawing.segmentation_drawer(classes, list(colours.values()), named=False)
        wanted = browsing.chosen(len(dataset), images if name == "training" else images // 2, seed)
        for index in tqdm(wanted, f"drawing {name} samples", delay=2, leave=False):
            with seeded(seed + index):
                picture = _sample(dataset, index, draw)
            if picture is not None:
                split.samples.append(picture)
        split.about_samples = (
            "Drawn at random, with the config's pipeline: resized, cropped, flipped and with the "
            "colours changed as training gets them."
            if name == "training"
            else "Drawn at random, resized as evaluation gets them."
        ) + " Pixels without a colour are ignored."
        found.append(split)
    return found, colours


def mask_reader(dataset: Any) -> Any:
    """The data set's own reader of masks: ``read(info)["gt_seg_map"]`` is ``(H, W)`` uint8.

    Args:
        dataset: the config of a data set.
    """
    steps = [s for s in pipeline_of(dataset) if s["type"] in _READS_MASKS]
    load = TRANSFORMS.build(steps[0] if steps else dict(type="LoadAnnotations"))
    return lambda info: load(dict(info, seg_fields=[]))


def _split(name: str, dataset: Any, classes: list[str], read: Any, check: int, seed: int) -> Split:
    split = Split(name, total=len(dataset))
    wanted = browsing.chosen(len(dataset), check, seed)
    infos = [dataset.get_data_info(index) for index in wanted]
    paths = [info["img_path"] for info in infos]
    split.photos = browsing.look_at(browsing.files_of(paths), f"reading {name} photos")
    sizes = {photo.name: photo.size for photo in split.photos}
    pixels = np.zeros(256, np.int64)
    images_of = np.zeros(256, np.int64)
    masks = 0
    for info in tqdm(infos, f"reading {name} masks", delay=2, leave=False, unit="mask"):
        mask = info["seg_map_path"]
        try:
            labels = read(info)["gt_seg_map"]
        # OpenCV's and Pillow's decoders raise many kinds of exceptions for a damaged file.
        except Exception as error:
            split.odd.append(f"{mask} cannot be read: {' '.join(str(error).split())[:200]}")
            continue
        if labels.ndim != 2:
            split.odd.append(f"{mask} has {labels.shape[-1]} channels: class indices need one")
            continue
        masks += 1
        counts = np.bincount(labels.ravel(), minlength=256)
        size = sizes.get(info["img_path"])
        if size and size != labels.shape[::-1]:
            have = f"{labels.shape[1]}x{labels.shape[0]}"
            split.odd.append(f"{mask} is {have}, its photo {size[0]}x{size[1]}")
        if len(counts) > 256 or counts[len(classes) : IGNORED].any():
            wrong = np.flatnonzero(counts[len(classes) :]) + len(classes)
            values = ", ".join(str(v) for v in wrong if v != IGNORED)
            split.odd.append(
                f"{mask} holds {values}: {len(classes)} classes are 0 to {len(classes) - 1}"
            )
        if not counts[: len(classes)].any():
            split.odd.append(f"{mask} has ignored pixels only")
        pixels += counts[:256]
        images_of += counts[:256] > 0
    total = max(1, int(pixels.sum()))
    labelled = max(1, int(pixels[: len(classes)].sum()))
    split.facts = {
        "photos": len(dataset),
        "masks read": masks,
        "classes": len(classes),
        "pixels in them": int(pixels.sum()),
        "ignored pixels (%)": round(100 * pixels[IGNORED] / total, 2),
    }
    shares = pixels[: len(classes)] / labelled
    # Of masks without labels, no class has a bar.
    largest = shares.max() or 1
    split.frequencies = page.Table(
        ["class", "pixels (%)", "masks"],
        [
            [
                class_name,
                page.Cell(round(100 * float(shares[i]), 3), share=float(shares[i] / largest)),
                int(images_of[i]),
            ]
            for i, class_name in enumerate(classes)
        ],
    )
    if masks and (missing := [c for i, c in enumerate(classes) if not pixels[i]]):
        more = f" and {len(missing) - 10} more" if len(missing) > 10 else ""
        split.odd.append(f"no pixel of these masks is of {', '.join(missing[:10])}{more}")
    return split


def _sample(dataset: Any, index: int, draw: Any) -> page.Picture | None:
    name = Path(dataset.get_data_info(index)["img_path"]).name
    try:
        packed = dataset[index]
    except UnreadableImage:
        return None
    image = np.ascontiguousarray(packed["inputs"].numpy().transpose(1, 2, 0)[..., ::-1])
    image = image.clip(0, 255).astype(np.uint8)
    labels = packed["data_samples"].gt_sem_seg.data[0].numpy()
    height, width = image.shape[:2]
    if labels.shape != image.shape[:2]:
        # In evaluation the photo is resized, and its mask is not.
        rows = np.arange(height) * labels.shape[0] // height
        labels = labels[rows][:, np.arange(width) * labels.shape[1] // width]
    caption = f"{name}: {width}x{height}"
    return page.Picture(draw(image, labels), caption, caption)
