"""Checks COCO-style data sets and enters them into a config's data loaders."""

import json
import logging
import os
from collections.abc import Sequence
from pathlib import Path

from detectron2.config import LazyCall as L
from detectron2.data import DatasetCatalog, MetadataCatalog, get_detection_dataset_dicts
from detectron2.data.datasets import register_coco_instances
from omegaconf import DictConfig, OmegaConf

from dense import files
from dense.detection import annotations
from dense.detection.config import LazyConfigError
from dense.detection.mapper import PhotoMapper

_logger = logging.getLogger(__name__)


_SPLITS = ("train", "val", "test")


class DataError(LazyConfigError):
    """A data set is missing or invalid; the message is one line."""


def resolve_data(cfg: DictConfig, *, training: bool) -> None:
    """Check a config's data and set its loaders, mask format and number of classes to match.

    ``cfg.data`` names COCO-style files: ``train_json``, ``train_images``, ``val_json``,
    ``val_images``, ``test_json`` and ``test_images`` (what is evaluated after training; the
    validation data without them), ``classes``, an ordered selection of category names (None: all of
    the JSON's), and ``allow_invalid``, which drops entries that cannot be used instead of raising.
    Without these files, the data sets of the loaders must be registered in Detectron2.
    Afterwards ``cfg.dataloader.metadata.classes`` holds the class names.

    Args:
        cfg: changed in place.
        training: True checks the training data, and those of validation and test if given; False
            those of the test.

    Raises:
        DataError: data is missing or invalid; the message names it.
    """
    data = cfg.get("data") or {}
    if any(data.get(f"{split}_{kind}") for split in _SPLITS for kind in ("json", "images")):
        classes = _use_json(cfg, data, training)
    else:
        classes = _check_registered(cfg, training)
    for key in ("model.roi_heads.num_classes", "model.num_classes"):
        if classes and OmegaConf.select(cfg, key) is not None:
            OmegaConf.update(cfg, key, len(classes))
    cfg.dataloader.metadata = {"classes": classes}


def json_dataset(
    names: str, json_file: str, image_root: str, filter_empty: bool = True
) -> list[dict]:
    """Register a COCO-style JSON and load it as Detectron2's dataset dicts.

    Args:
        names: name to register it under, which evaluators refer to.
        json_file: path of the annotations.
        image_root: folder that the JSON's file names are relative to.
        filter_empty: drop images without annotations other than crowds.
    """
    for catalog in (DatasetCatalog, MetadataCatalog):
        if names in catalog.list():
            catalog.remove(names)
    register_coco_instances(names, {}, json_file, image_root)
    return get_detection_dataset_dicts(names, filter_empty=filter_empty)


def _use_json(cfg: DictConfig, data: DictConfig, training: bool) -> list[str]:
    given = [s for s in _SPLITS if data.get(f"{s}_json") or data.get(f"{s}_images")]
    needed = ["test" if "test" in given else "val"]
    if training:
        needed = ["train", *(split for split in given if split != "train")]
    classes = list(data.get("classes") or [])
    for split in needed:
        json_file, images, content = _read(data, split)
        names = _category_names(content, json_file)
        classes = classes or names
        _check_classes(classes, names, json_file, must_have=split == needed[0])
        kept = _without_faults(content, json_file, images, bool(data.get("allow_invalid")))
        _fit_masks(cfg, kept, json_file, split)
        if names != classes or kept is not content:
            kept = _with_classes(kept, classes, json_file, split)
            path = Path(cfg.train.output_dir, "annotations", f"{split}.json")
            path.parent.mkdir(parents=True, exist_ok=True)
            json_file = str(files.write(path, json.dumps(kept)))
        if training and split == "test":
            # For --eval-only: while training, the loader has the validation data.
            continue
        loader = cfg.dataloader["train" if split == "train" else "test"]
        loader.dataset = L(json_dataset)(
            names=json_file, json_file=json_file, image_root=images, filter_empty=split == "train"
        )
    if training and "val" not in needed:
        _logger.warning("no validation data (--val-json): training without evaluation")
        evaluator = cfg.dataloader.pop("evaluator", None)
        if evaluator is not None:
            # For --eval-only with the saved config.
            cfg.dataloader.test_evaluator = evaluator
    elif "test_evaluator" in cfg.dataloader:
        cfg.dataloader.evaluator = cfg.dataloader.pop("test_evaluator")
    return classes


def _read(data: DictConfig, split: str) -> tuple[str, str, dict]:
    """Paths of a split's JSON and image folder, and the parsed JSON."""
    for kind, noun, exists in (("json", "file", Path.is_file), ("images", "folder", Path.is_dir)):
        key = f"{split}_{kind}"
        if not data.get(key):
            raise DataError(f"data.{key} is not set (--{key.replace('_', '-')})")
        if not exists(Path(data[key])):
            raise DataError(f"data.{key}: there is no {noun} {data[key]}")
    json_file, images = str(data[f"{split}_json"]), data[f"{split}_images"]
    try:
        content = json.loads(Path(json_file).read_text())
    except ValueError as error:
        raise DataError(f"{json_file} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise DataError(f"{json_file}: expected a COCO-style object, not {type(content).__name__}")
    for key in ("images", "annotations", "categories"):
        if not isinstance(content.get(key), list):
            raise DataError(f"{json_file} has no list {key!r}: it is not COCO-style")
    if not content["images"]:
        raise DataError(f"{json_file} lists no image")
    return json_file, images, content


def _category_names(content: dict, json_file: str) -> list[str]:
    """Category names by ascending id, as Detectron2 numbers its class indices."""
    try:
        names = [c["name"] for c in sorted(content["categories"], key=lambda c: c["id"])]
    except KeyError as error:
        raise DataError(f"{json_file}: a category has no {error}") from error
    twice = sorted({n for n in names if names.count(n) > 1})
    if twice:
        raise DataError(f"{json_file} has several categories named {', '.join(twice)}")
    if not names:
        raise DataError(f"{json_file} lists no category")
    return names


def _check_classes(
    classes: Sequence[str], names: Sequence[str], json_file: str, must_have: bool
) -> None:
    absent = [c for c in classes if c not in names]
    if len(set(classes)) < len(classes):
        raise DataError(f"data.classes names a class twice: {', '.join(classes)}")
    if absent and (must_have or len(absent) == len(classes)):
        raise DataError(
            f"{json_file} has no category {', '.join(absent)}; it has {', '.join(names)}"
        )
    if absent:
        _logger.warning(f"{json_file} has no category {', '.join(absent)}: no objects of these")
    others = [n for n in names if n not in classes]
    if others:
        _logger.warning(f"{json_file}: objects of {', '.join(others)} are ignored")


def _without_faults(content: dict, json_file: str, images: str, allow_invalid: bool) -> dict:
    """The content, without the entries that cannot be used if ``allow_invalid`` is set."""
    found = annotations.faults(content, images)
    if found and not allow_invalid:
        raise DataError(f"{annotations.described(found, json_file)}. --allow-invalid drops them")
    if found:
        _logger.warning(f"{annotations.described(found, json_file)}. They are dropped")
        content = annotations.without(content, found)
    if not content["images"]:
        raise DataError(f"{json_file} lists no image that can be used")
    if all(a.get("iscrowd", 0) for a in content["annotations"]):
        raise DataError(f"{json_file} has no annotation to use")
    return content


def _fit_masks(cfg: DictConfig, content: dict, json_file: str, split: str) -> None:
    """Check that a mask head gets masks; set the mapper's mask options."""
    objects = [a for a in content["annotations"] if not a.get("iscrowd", 0)]
    has_mask_head = OmegaConf.select(cfg, "model.roi_heads.mask_in_features") is not None
    without = sum(not a.get("segmentation") for a in objects)
    if has_mask_head and without:
        raise DataError(
            f"{json_file}: {without} of {len(objects)} objects have no segmentation, and the model "
            "has a mask head; model.roi_heads.mask_in_features=null removes it"
        )
    mapper = OmegaConf.select(cfg, "dataloader.train.mapper")
    if split == "train" and mapper is not None:
        mapper.use_instance_mask = has_mask_head
        if mapper._target_ is PhotoMapper:
            mapper.total = len(content["images"])
        mapper.recompute_boxes = bool(mapper.get("recompute_boxes")) and has_mask_head
        if any(isinstance(a.get("segmentation"), dict) for a in objects):
            mapper.instance_mask_format = "bitmask"


def _with_classes(content: dict, classes: Sequence[str], json_file: str, split: str) -> dict:
    """The content with ``classes`` as its categories, in order, and their objects alone."""
    indices = {
        c["id"]: classes.index(c["name"]) + 1 for c in content["categories"] if c["name"] in classes
    }
    kept = [
        {**a, "category_id": indices[a["category_id"]]}
        for a in content["annotations"]
        if a["category_id"] in indices
    ]
    if split == "train" and all(a.get("iscrowd", 0) for a in kept):
        raise DataError(f"{json_file} has no annotation of {', '.join(classes)}")
    categories = [{"id": i, "name": name} for i, name in enumerate(classes, 1)]
    return {**content, "categories": categories, "annotations": kept}


def _check_registered(cfg: DictConfig, training: bool) -> list[str] | None:
    """Check the files of data sets registered in Detectron2; return their class names."""
    classes = None
    loaders = ["train"] if training else []
    loaders += ["test"] if "evaluator" in cfg.dataloader else []
    for loader in loaders:
        names = OmegaConf.select(cfg, f"dataloader.{loader}.dataset.names")
        for name in [names] if isinstance(names, str) else names or []:
            if name not in DatasetCatalog.list():
                raise DataError(f"dataloader.{loader}: no data set {name!r} in Detectron2")
            metadata = MetadataCatalog.get(name)
            for path in (metadata.get("json_file"), metadata.get("image_root")):
                if path and not os.path.exists(path):
                    root = os.environ.get("DETECTRON2_DATASETS", "./datasets")
                    raise DataError(
                        f"data set {name}: {path} does not exist. DETECTRON2_DATASETS (now {root}) "
                        "is the folder that holds coco/; for your own data use --train-json, "
                        "--train-images, --val-json, --val-images"
                    )
            classes = classes or metadata.get("thing_classes")
    return list(classes) if classes else None
