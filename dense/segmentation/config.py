"""Config handling of the segmentation tools: reading, own data, checks before building.

This module does not import MMSegmentation.
"""

import copy
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from mmengine.runner import Runner
from mmengine.utils import import_modules_from_strings

from dense.openmmlab.config import ConfigError, build_runner, load_config, use_amp, use_tta
from dense.options import listed_classes
from dense.segmentation.data import check_folders, check_masks, check_overlap

__all__ = ["build_runner", "check", "load_config", "set_data_root", "use_amp", "use_own_data"]
__all__ += ["set_short_side", "set_test_data", "use_exported", "use_tta"]

_MODULES = ["dense.segmentation.dataset", "dense.segmentation.losses"]
_OWN_DATA = ("train_images", "train_masks", "val_images", "val_masks", "classes")
_OWN_DATA_OPTIONS = ("test_images", "test_masks", "ignore_index", "reduce_zero_label")
_LOADERS = ("train_dataloader", "val_dataloader", "test_dataloader")
_RESIZING = ("RandomChoice", "RandomChoiceResize", "RandomResize", "Resize")
# Of the training images' short side; the long side is at most four times as long.
_RATIOS = (0.75, 1.5)
_TTA_RATIOS = (0.5, 0.75, 1.0, 1.25, 1.5, 1.75)


def use_exported(runner: Runner, path: str) -> None:
    """Have a file of ``tools/export.py`` compute the logits of a runner's segmentor.

    Raises:
        ExportError: the file cannot be read, is of another task, or has other classes.
        ImportError: the engine is not installed.
    """
    from dense.export.evaluation import read_for, use_in_segmentor

    segmentor = runner.model.module if runner.distributed else runner.model
    classes = runner.test_loop.dataloader.dataset.metainfo.get("classes")
    use_in_segmentor(segmentor, read_for("segmentation", path, classes))


def set_data_root(cfg: Config, data_root: str) -> None:
    """Set the ``data_root`` of all three data loaders.

    Raises:
        ConfigError: the config names folders by absolute paths, as that of a training on own data.
    """
    for loader in _LOADERS:
        dataset = cfg[loader].dataset
        for folder in (dataset.get("data_prefix") or {}).values():
            if Path(folder).is_absolute():
                raise ConfigError(
                    f"--data-root {data_root}: {loader} has the absolute path {folder}, which no "
                    f"data root moves; --cfg-options {loader}.dataset.data_prefix.img_path=... does"
                )
        dataset.data_root = data_root


def set_short_side(cfg: Config, pixels: int) -> None:
    """Resize all photos to a short side of ``pixels``, in training times 0.75 to 1.5.

    The steps that resize in the config's pipelines are replaced; with ``--tta`` by Swin's ratios
    of ``pixels``. Crops are at most ``pixels`` wide.

    >>> set_short_side(cfg, 128)

    Args:
        cfg: changed in place.
        pixels: 32 or more.

    Raises:
        ConfigError: ``pixels`` is below 32, the stride of the last stage.
    """
    if pixels < 32:
        raise ConfigError(f"--short-side {pixels}: 32 or more is needed")
    scale = dict(scale=(4 * pixels, pixels), keep_ratio=True)
    for loader in _LOADERS:
        training = loader == "train_dataloader"
        resize = dict(type="RandomResize", ratio_range=_RATIOS) if training else dict(type="Resize")
        steps = [s for s in cfg[loader].dataset.pipeline if s.type not in _RESIZING]
        # In training, masks are resized too; in tests, they keep their size.
        steps.insert(2 if training else 1, resize | scale)
        for step in steps:
            if step["type"] == "RandomCrop":
                step.crop_size = tuple(min(side, pixels) for side in step.crop_size)
                cfg.model.data_preprocessor.size = step.crop_size
        cfg[loader].dataset.pipeline = steps
    for step in cfg.get("tta_pipeline") or []:
        if step["type"] == "TestTimeAug":
            others = [steps for steps in step.transforms if steps[0]["type"] not in _RESIZING]
            sizes = [(int(4 * pixels * ratio), int(pixels * ratio)) for ratio in _TTA_RATIOS]
            step.transforms = [
                [dict(type="Resize", scale=size, keep_ratio=True) for size in sizes],
                *others,
            ]
    # What predicts a photo reads.
    cfg.test_pipeline = copy.deepcopy(cfg.test_dataloader.dataset.pipeline)


def use_own_data(cfg: Config, given: dict[str, Any] | None = None) -> None:
    """Replace the data sets by folders of images and masks, and set the heads' ``num_classes``.

    >>> use_own_data(cfg, dict(train_images="images/train", train_masks="masks/train", ...))

    Args:
        cfg: changed in place. Its dict ``data`` may have ``train_images``, ``train_masks``,
            ``val_images``, ``val_masks``, ``classes`` (names, by index, or a file of them as
            :func:`dense.options.listed_classes` takes it), ``test_images`` and ``test_masks``
            (the validation's without them), ``ignore_index`` (a mask value to ignore, besides 255)
            and ``reduce_zero_label`` (True ignores 0 and numbers the classes from 1). Without any
            of these, ``cfg`` does not change.
        given: the same keys from a command line; they take precedence.

    Raises:
        ConfigError: a key is missing or unknown, or the classes are invalid.
    """
    data = {**(cfg.pop("data", None) or {}), **{k: v for k, v in (given or {}).items() if v}}
    if given and given.get("ignore_index") is not None:
        data["ignore_index"] = given["ignore_index"]
    if not data:
        return
    if unknown := sorted(set(data) - {*_OWN_DATA, *_OWN_DATA_OPTIONS}):
        valid = ", ".join((*_OWN_DATA, *_OWN_DATA_OPTIONS))
        raise ConfigError(f"data has {', '.join(unknown)}: {valid} are valid")
    if missing := [key for key in _OWN_DATA if not data.get(key)]:
        needed = ", ".join(_OWN_DATA)
        raise ConfigError(f"{', '.join(missing)} not given: your own data needs {needed}")
    if bool(data.get("test_images")) != bool(data.get("test_masks")):
        raise ConfigError("test_images and test_masks are given together or not at all")
    classes, palette = _checked_classes(data["classes"])
    if palette and (data.get("reduce_zero_label") or data.get("ignore_index", 255) != 255):
        raise ConfigError(
            f"{data['classes']} has colours: ignore_index and reduce_zero_label are for masks of "
            "indices; a line - R G B ignores a colour"
        )
    meta = dict(classes=classes)
    colours = palette and palette[: len(classes)]
    if palette:
        meta |= dict(palette=colours, ignored=palette[len(classes) :])

    for loader, split in zip(_LOADERS, ("train", "val", "test"), strict=True):
        if not data.get(f"{split}_images"):
            split = "val"
        dataset = dict(
            type="FolderDataset",
            data_root=None,
            data_prefix=dict(
                img_path=str(Path(data[f"{split}_images"]).absolute()),
                seg_map_path=str(Path(data[f"{split}_masks"]).absolute()),
            ),
            metainfo=meta,
            ignore_index=data.get("ignore_index", 255),
            reduce_zero_label=bool(data.get("reduce_zero_label", False)),
            pipeline=[_of_own_data(step, colours) for step in pipeline_of(cfg[loader].dataset)],
        )
        cfg[loader].dataset = dataset
    if cfg.get("tta_pipeline"):
        cfg.tta_pipeline = [_of_own_data(step, colours) for step in cfg.tta_pipeline]
    for head in _heads(cfg):
        head.num_classes = len(classes)
        # Mask2Former's; the last weight is of no object.
        if weights := (head.get("loss_cls") or {}).get("class_weight"):
            head.loss_cls.class_weight = [1.0] * len(classes) + [weights[-1]]
        losses = head.get("loss_decode") or []
        for loss in losses if isinstance(losses, list) else [losses]:
            if loss.type == "CrossEntropyLoss" and loss.get("class_weight"):
                loss.type = "WeightedCrossEntropyLoss"
    # Registers what the config refers to; a stock config does not import it.
    cfg.setdefault("custom_imports", dict(imports=[]))
    cfg.custom_imports.imports = [*cfg.custom_imports.imports, *_MODULES]
    import_modules_from_strings(_MODULES)


def pipeline_of(dataset: dict) -> list[dict]:
    """The pipeline of a data set, or of the first one that it concatenates or repeats."""
    while "pipeline" not in dataset:
        dataset = dataset["datasets"][0] if "datasets" in dataset else dataset["dataset"]
    return dataset["pipeline"]


def set_test_data(cfg: Config, images: str | None, masks: str | None) -> None:
    """Test on other folders of images and masks than a training on own data was given.

    Args:
        cfg: the config that the training saved; changed in place. Without folders it stays.
        images: the folder of the images.
        masks: the folder of their masks.

    Raises:
        ConfigError: one folder is given alone, or the config is of a standard data set.
    """
    if not (images or masks):
        return
    if not (images and masks):
        raise ConfigError("--test-images and --test-masks are given together or not at all")
    dataset = cfg.test_dataloader.dataset
    if dataset.type != "FolderDataset":
        raise ConfigError(
            f"--test-images: {cfg.filename} tests on {dataset.type}; the config that a training on "
            "own data saved is needed"
        )
    dataset.data_prefix = dict(
        img_path=str(Path(images).absolute()), seg_map_path=str(Path(masks).absolute())
    )


def _of_own_data(step: dict, colours: list | None = None) -> dict:
    """A step of a pipeline for own data, which may hold any kind of image."""
    if step["type"] == "LoadAnnotations" and colours:
        return dict(type="ReadColouredMask", palette=colours)
    # The data set sets reduce_zero_label, not a step of its pipeline.
    step = {k: v for k, v in step.items() if k != "reduce_zero_label"}
    if step["type"] == "TestTimeAug":
        step["transforms"] = [
            [_of_own_data(s, colours) for s in steps] for steps in step["transforms"]
        ]
    return dict(type="ReadImage") if step["type"] == "LoadImageFromFile" else step


def check(cfg: Config, training: bool) -> None:
    """Check folders, masks and batch size before anything is built.

    Args:
        cfg: the final config.
        training: True checks the data of training and validation, and own folders of the test's;
            False the test's.

    Raises:
        ConfigError: the first fault found.
    """
    all_pairs = []
    loaders = list(_LOADERS if training else _LOADERS[2:])
    test = cfg.get("test_dataloader")
    # A training reads no test data; that of own folders is checked all the same.
    own = test and test.dataset.type == "FolderDataset"
    if training and (not own or test.dataset == cfg.val_dataloader.dataset):
        loaders.pop()
    for loader in loaders:
        dataset = cfg[loader].dataset
        pairs = check_folders(dataset, loader)
        all_pairs.append(pairs)
        if dataset.type == "FolderDataset":
            # A palette may be for drawing alone, over masks of indices.
            coloured = any(step["type"] == "ReadColouredMask" for step in pipeline_of(dataset))
            info = dataset.metainfo
            check_masks(
                pairs,
                info["classes"],
                dataset.ignore_index,
                dataset.reduce_zero_label,
                [*info["palette"], *info.get("ignored", [])] if coloured else [],
            )
    if training:
        check_overlap(*all_pairs[:2])
    if training and _pools_to_one_value(cfg) and cfg.train_dataloader.batch_size < 2:
        raise ConfigError(
            "train_dataloader.batch_size=1: the head pools an image to one value per channel, and "
            "batch norm needs 2 or more values: take 2 or more images per process"
        )


def _checked_classes(
    classes: str | list[str] | tuple[str, ...],
) -> tuple[tuple[str, ...], list[tuple[int, ...]] | None]:
    """The names, and the colours of the classes and of what is ignored."""
    palette = None
    if isinstance(classes, str):
        try:
            classes, palette = listed_classes(classes)
        except ValueError as error:
            raise ConfigError(f"--classes: {error}") from error
    names = tuple(str(name).strip() for name in classes)
    if len(names) < 2:
        raise ConfigError(f"classes={names}: 2 or more; the background is a class of its own")
    if len(names) > 255:
        raise ConfigError(f"{len(names)} classes: 8-bit masks hold 255 at most")
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ConfigError(f"classes has {', '.join(twice)} twice")
    if "" in names:
        raise ConfigError(f"classes={names}: a name is empty")
    return names, palette


def _heads(cfg: Config) -> list:
    heads = []
    for key in ("decode_head", "auxiliary_head"):
        head = cfg.model.get(key) or []
        heads += head if isinstance(head, list | tuple) else [head]
    return heads


def _pools_to_one_value(cfg: Config) -> bool:
    """Whether batch size 1 leaves some batch norm with a single value per channel."""
    synced = torch.cuda.is_available() and cfg.get("launcher", "none") != "none"
    return not synced and bool({head.type for head in _heads(cfg)} & {"UPerHead", "PSPHead"})
