"""A training's checkpoint stripped to what others need: the weights, and what they are."""

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
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor

import backbones
from backbones.checkpoints import backbone_of
from backbones.conversion import write_weights
from backbones.reading import CheckpointError, class_names, read_content
from dense import files
from dense.metrics import read_run
from dense.recipes import config_beside

WEIGHTS = ("averaged", "model")
_BEGIN, _END = "<!-- Published models, by tools/publish_checkpoint.py. -->", "<!-- End of them. -->"
_HEAD = (
    "| model | recipe | image | classes | top-1 | top-5 | file |",
    "| --- | --- | --- | --- | --- | --- | --- |",
)


@dataclass(frozen=True)
class Published:
    """What was written.

    Attributes:
        files: the ``.pth`` and the ``.safetensors``.
        meta: what is kept beside the weights.
        line: the model's line for a table.
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
    """Write a checkpoint's weights with their meta, as ``.pth`` and ``.safetensors``.

    The files are called after the recipe and the first eight digits of their SHA-256, as torch.hub
    and timm check it. A classifier is written by the network's own names and loaded into a network
    of its name before it is called published; a detector or segmentor by its framework's names.

    Args:
        checkpoint: what one of the three trainings wrote.
        out: the folder to write into.
        config: what it was trained with; None takes the one beside the checkpoint.
        weights: of a run with averaged weights, ``"averaged"`` or ``"model"``, those that the
            optimizer moved.

    Raises:
        CheckpointError: the file cannot be read, or does not fill a network of its name.
        RecipeError: there is no config beside it.
        ValueError: weights that the checkpoint does not have.
    """
    content = read_content(checkpoint)
    state_dict = _chosen(content, weights, str(checkpoint))
    config = Path(config or config_beside(checkpoint))
    classes = class_names(content)
    meta = {
        "model": None,
        "classes": list(classes) if classes else None,
        "image_size": None,
        "mean": None,
        "std": None,
        "recipe": _recipe(config, Path(checkpoint)),
        "weights": weights if "ema_state_dict" in content else "model",
        "metrics": _metrics(Path(checkpoint), content),
        "versions": {"torch": str(torch.__version__), "timm": timm.__version__},
    }
    backbone = backbone_of(state_dict)
    if "head.fc.weight" in backbone:
        state_dict = backbone
        meta |= _of_the_classifier(config)
    else:
        meta |= {"model": _backbone_name(config)} | _normalisation(config)
    out = Path(out)
    written = [out / f"{meta['recipe']}{suffix}" for suffix in (".pth", ".safetensors")]
    try:
        for file in written:
            write_weights(file, state_dict, "state_dict", meta=meta)
            if "head.fc.weight" in backbone:
                _check(file, meta)
    except Exception:
        for file in written:
            file.unlink(missing_ok=True)
        raise
    published = tuple(file.replace(_with_hash(file)) for file in written)
    return Published(published, meta, _line(meta, published[0]))


def write_line(published: Published, readme: str | Path) -> None:
    """Put a model's line into the table of a document, in the place of an older one of its recipe.

    The table stands between two comments; where they are missing they are added at the end.
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
        # MMEngine keeps the averaged weights under "state_dict" and these, wrapped, beside them.
        found = content["ema_state_dict"]
        return {k.removeprefix("module."): v for k, v in found.items() if k != "steps"}
    for key in ("state_dict", "model"):
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            return content[key]
    raise CheckpointError(f"{source} is no checkpoint of a training: it has no state_dict or model")


def _with_hash(file: Path) -> Path:
    digest = hashlib.sha256(file.read_bytes()).hexdigest()[:8]
    return file.with_name(f"{file.stem}-{digest}{file.suffix}")


def _recipe(config: Path, checkpoint: Path) -> str:
    # Detectron2's trainings write every config as config.yaml; their folder has the name.
    return checkpoint.absolute().parent.name if config.suffix == ".yaml" else config.stem


def _of_the_classifier(config: Path) -> dict[str, Any]:
    from dense.openmmlab.config import load_config

    cfg = load_config(config)
    transform = cfg.val_dataloader.dataset.transform
    options = {
        key: cfg.model[key] for key in ("img_size", "window_size", "shared") if key in cfg.model
    }
    return {
        "model": cfg.model.name,
        "image_size": transform.input_size,
        "mean": list(transform.get("mean", IMAGENET_DEFAULT_MEAN)),
        "std": list(transform.get("std", IMAGENET_DEFAULT_STD)),
        "options": options,
    }


def _normalisation(config: Path) -> dict[str, list[float] | None]:
    """Mean and standard deviation of a detector's or segmentor's pixels, of 0 to 1 as timm's."""
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
    text = config.read_text()
    found = re.search(r"\b(" + "|".join(backbones.MODEL_NAMES) + r")\b", text)
    return found[1] if found else None


def _metrics(checkpoint: Path, content: Mapping[str, Any]) -> dict[str, float]:
    """The validation's figures at the checkpoint's iteration, from the logs beside it."""
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
        raise CheckpointError(f"what was published does not fill a {meta['model']}: {report}")


def _line(meta: dict[str, Any], file: Path) -> str:
    metrics = meta["metrics"]
    figures = [f"{metrics[key]:.1f}" if key in metrics else "" for key in ("top1", "top5")]
    size = f"{meta['image_size']}x{meta['image_size']}" if meta["image_size"] else ""
    count = len(meta["classes"]) if meta["classes"] else ""
    cells = (f"`{meta['model']}`", f"`{meta['recipe']}`", size, count, *figures, f"`{file.name}`")
    return f"| {' | '.join(map(str, cells))} |"


def as_json(meta: dict[str, Any]) -> str:
    """The meta without the list of classes, for people."""
    shown = dict(meta, classes=len(meta["classes"] or []))
    return json.dumps(shown, indent=1)
