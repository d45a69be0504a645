"""Strip a training checkpoint to its weights and their metadata."""

import hashlib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
import yaml
from timm.data import DEFAULT_CROP_PCT, IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor

import backbones
from backbones.checkpoints import backbone_of
from backbones.conversion import write_weights
from backbones.reading import CheckpointError, class_names, read_content, refuse_not_finite
from dense import files
from dense.metrics import read_run
from dense.recipes import config_beside, framework_of

WEIGHTS = ("averaged", "model")
_BEGIN, _END = "<!-- Published models, by tools/publish_checkpoint.py. -->", "<!-- End of them. -->"
_HEAD = (
    "| model | recipe | image | classes | top-1 | top-5 | file |",
    "| --- | --- | --- | --- | --- | --- | --- |",
)


@dataclass(frozen=True)
class Published:
    """The result of :func:`publish`.

    Attributes:
        files: the ``.pth`` and the ``.safetensors``.
        meta: the metadata saved with the weights.
        line: the model's row of a Markdown table.
    """

    files: tuple[Path, Path]
    meta: dict[str, Any]
    line: str


def publish(
    checkpoint: str | Path,
    out: str | Path,
    *,
    config: str | Path | None = None,
    weights: str = "averaged",
) -> Published:
    """Write a checkpoint's weights and metadata as ``.pth`` and ``.safetensors``.

    File names are ``<recipe>-<hash>``, with the first eight digits of the SHA-256, which torch.hub
    and timm check. A classifier's state dict gets timm's names and is loaded into a new model as a
    check; a detector or segmentor keeps its framework's names, and its backbone is loaded.

    Args:
        checkpoint: written by ``pretrain.py``, ``train_segmentor.py`` or ``train_detector.py``.
        out: the folder to write into.
        config: the config of the training; None takes the one beside the checkpoint.
        weights: ``"averaged"`` or ``"model"`` (not averaged), for a run that averaged weights.

    Raises:
        CheckpointError: the file cannot be read, has NaN or infinite weights, or does not fill its
            model.
        RecipeError: no config, or several, beside the checkpoint.
        ValueError: ``weights`` is neither of the two.

    Example:
        >>> publish("work_dirs/mine/epoch_30.pth", "published").files
    """
    content = read_content(checkpoint)
    state_dict = _chosen(content, weights, str(checkpoint))
    refuse_not_finite(state_dict, checkpoint)
    config = Path(config or config_beside(checkpoint))
    # Detectron2 saves every config as config.yaml: the folder's name is the recipe.
    recipe = Path(checkpoint).absolute().parent.name if config.suffix == ".yaml" else config.stem
    classes = class_names(content)
    meta = {
        "model": None,
        "classes": list(classes) if classes else None,
        "image_size": None,
        "mean": None,
        "std": None,
        "recipe": recipe,
        "weights": weights if "ema_state_dict" in content else "model",
        "metrics": _metrics(Path(checkpoint), content),
        "versions": {"torch": str(torch.__version__), "timm": timm.__version__},
    }
    backbone = backbone_of(state_dict)
    if framework_of(config) == "classification" and "head.fc.weight" not in backbone:
        raise CheckpointError(f"{checkpoint} is of no classifier, but {config} trains one")
    if "head.fc.weight" in backbone:
        state_dict = backbone
        meta |= _of_the_classifier(config)
    else:
        meta |= {"model": _backbone_name(config)} | _normalisation(config)
    out = Path(out)
    written = [out / f"{recipe}{suffix}" for suffix in (".pth", ".safetensors")]
    try:
        for file in written:
            write_weights(file, state_dict, "state_dict", meta=meta)
            if "head.fc.weight" in backbone:
                _check(file, meta)
            elif meta["model"]:
                backbones.load_checkpoint(timm.create_model(meta["model"], num_classes=0), file)
    except Exception as error:
        for other in written:
            other.unlink(missing_ok=True)
        if isinstance(error, CheckpointError):
            # The file that was written does not fit because the one that was read does not.
            raise CheckpointError(str(error).replace(str(file), str(checkpoint))) from error
        raise
    published = tuple(file.replace(_with_hash(file)) for file in written)
    return Published(published, meta, _line(meta, published[0]))


def write_line(published: Published, readme: str | Path) -> None:
    """Put a model's row into the table of a Markdown file; it replaces the recipe's older row.

    The table stands between two marker comments, which are appended if they are missing.
    """
    path = Path(readme)
    text = path.read_text() if path.is_file() else ""
    if _BEGIN not in text:
        text = f"{text.rstrip()}\n\n## Published models\n\n{_BEGIN}\n{_END}\n".lstrip()
    before, _, rest = text.partition(_BEGIN)
    block, _, after = rest.partition(_END)
    rows = [line for line in block.splitlines() if line.startswith("| `")]
    recipe = f"| `{published.meta['recipe']}` |"
    rows = sorted([row for row in rows if recipe not in row] + [published.line])
    table = "\n".join((*_HEAD, *rows))
    files.write(path, f"{before}{_BEGIN}\n\n{table}\n\n{_END}{after}")


def _chosen(content: Any, weights: str, source: str) -> Mapping[str, Tensor]:
    if weights not in WEIGHTS:
        raise ValueError(f"weights {weights!r}: {' and '.join(WEIGHTS)} are valid")
    averaged = isinstance(content, Mapping) and "ema_state_dict" in content
    if weights == "model" and averaged:
        # MMEngine's checkpoints swap the two: "ema_state_dict" has the weights not averaged.
        found = content["ema_state_dict"]
        return {k.removeprefix("module."): v for k, v in found.items() if k != "steps"}
    for key in ("state_dict", "model"):
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            return content[key]
    raise CheckpointError(f"{source} is no training checkpoint: it has no state_dict or model")


def _with_hash(file: Path) -> Path:
    digest = hashlib.sha256(file.read_bytes()).hexdigest()[:8]
    return file.with_name(f"{file.stem}-{digest}{file.suffix}")


def _of_the_classifier(config: Path) -> dict[str, Any]:
    from dense.openmmlab.config import load_config
    from dense.pretraining.model import network_options

    cfg = load_config(config)
    transform = cfg.val_dataloader.dataset.transform
    # Trained, it drops nothing.
    dropping = ("drop_rate", "drop_path_rate")
    options = {k: v for k, v in network_options(cfg.model).items() if k not in dropping}
    return {
        "model": cfg.model.name,
        "image_size": transform.input_size,
        "crop_pct": transform.get("crop_pct", DEFAULT_CROP_PCT),
        "mean": list(transform.get("mean", IMAGENET_DEFAULT_MEAN)),
        "std": list(transform.get("std", IMAGENET_DEFAULT_STD)),
        "options": options,
    }


def _normalisation(config: Path) -> dict[str, list[float] | None]:
    """Pixel mean and std of a detector or segmentor, scaled from 0..255 to timm's 0..1."""
    if config.suffix == ".yaml":
        model = yaml.safe_load(config.read_text()).get("model") or {}
        mean, std = model.get("pixel_mean"), model.get("pixel_std")
    else:
        from dense.openmmlab.config import load_config

        preprocessor = load_config(config).model.get("data_preprocessor") or {}
        mean, std = preprocessor.get("mean"), preprocessor.get("std")
    return {
        key: [round(value / 255, 6) for value in values] if values else None
        for key, values in (("mean", mean), ("std", std))
    }


def _backbone_name(config: Path) -> str | None:
    found = re.search(rf"\b({'|'.join(backbones.MODEL_NAMES)})\b", config.read_text())
    return found[1] if found else None


def _metrics(checkpoint: Path, content: Mapping[str, Any]) -> dict[str, float]:
    """The validation metrics at the checkpoint's iteration, from the logs beside it."""
    meta = content.get("meta") if isinstance(content.get("meta"), Mapping) else {}
    step = content.get("iteration", meta.get("iter"))
    try:
        run = read_run(checkpoint.absolute().parent)
    except (OSError, ValueError):
        return {}
    if run.epochs:
        step = run.epochs.get(meta.get("epoch"), -math.inf)
    found = {}
    for name, points in run.metrics.items():
        at = [value for iteration, value in points if step is None or abs(iteration - step) <= 1]
        if at and math.isfinite(at[-1]):
            found[name] = round(at[-1], 3)
    return found


def _check(file: Path, meta: dict[str, Any]) -> None:
    classes = meta["classes"]
    weight = backbones.read_checkpoint(file)["head.fc.weight"]
    network = timm.create_model(meta["model"], num_classes=len(weight), **meta["options"])
    report = backbones.load_checkpoint(network, file, classes=classes)
    if report.missing or report.unexpected or report.resized:
        raise CheckpointError(f"the published file does not fill a {meta['model']}: {report}")


def _line(meta: dict[str, Any], file: Path) -> str:
    metrics = meta["metrics"]
    figures = [f"{metrics[key]:.1f}" if key in metrics else "" for key in ("top1", "top5")]
    size = f"{meta['image_size']}x{meta['image_size']}" if meta["image_size"] else ""
    count = len(meta["classes"]) if meta["classes"] else ""
    cells = (f"`{meta['model']}`", f"`{meta['recipe']}`", size, count, *figures, f"`{file.name}`")
    return f"| {' | '.join(map(str, cells))} |"


def as_json(meta: dict[str, Any]) -> str:
    """The metadata as JSON, with the number of classes in place of their names."""
    return json.dumps(dict(meta, classes=len(meta["classes"] or [])), indent=1)
