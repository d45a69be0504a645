"""Networks of trained checkpoints as functions of tensors alone, and what a file says of them."""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor, nn

from dense import recipes
from dense.export.files import ExportError
from dense.export.graphs import LARGEST, SMALLEST

PARTS = ("whole", "backbone")


@dataclass(frozen=True)
class Source:
    """A trained network, ready to be exported.

    Attributes:
        network: in evaluation mode, ``(B, 3, H, W)``, normalised, to a tuple of tensors.
        about: what the file's metadata will be; :mod:`dense.export.files` lists its keys.
        size: rows and columns of the images that it was trained on; a detector's, of evaluation.
    """

    network: nn.Module
    about: dict[str, Any]
    size: tuple[int, int]


def read_source(
    checkpoint: str | os.PathLike, config: str | None = None, part: str = "whole"
) -> Source:
    """Load a trained classifier, segmentor or detector, or the backbone of one.

    >>> read_source("work_dirs/mine").about["task"]
    'segmentation'

    Args:
        checkpoint: a ``.pth`` of the training, or its folder, for the newest one in it.
        config: the config of the training; None takes the one beside the checkpoint.
        part: ``"whole"``, or ``"backbone"`` for the maps of the stages.

    Raises:
        ExportError: there is no checkpoint in the folder, or the network cannot be exported.
        RecipeError: no config, or several, beside the checkpoint.
        ConfigError, CheckpointError: they cannot be read or do not fit.
    """
    checkpoint = _file_of(Path(checkpoint))
    config = config or str(recipes.config_beside(checkpoint))
    framework = recipes.framework_of(config)
    if framework not in _READERS:
        valid = " and ".join(_READERS)
        raise ExportError(f"{config} is of {framework}: exported are {valid}")
    return _READERS[framework](config, str(checkpoint), part)


def _file_of(checkpoint: Path) -> Path:
    if not checkpoint.is_dir():
        return checkpoint
    # Detectron2's training leaves its config under this name.
    if (checkpoint / "config.yaml").is_file():
        from dense.detection.checkpoint import WholeCheckpointer

        last = WholeCheckpointer(nn.Module(), str(checkpoint)).last_whole()
        newest = Path(last) if last else None
    else:
        from dense.openmmlab.checkpoints import newest_whole

        newest, _ = newest_whole(checkpoint)
    if newest is None:
        raise ExportError(f"{checkpoint} holds no finished checkpoint: name the .pth file")
    return newest


def _classifier(config: str, checkpoint: str, part: str) -> Source:
    from dense.pretraining.predictor import load_predictor

    predictor = load_predictor(config, checkpoint)
    network, transform = predictor.network, predictor.transform
    scaled = [
        [255 * float(value) for value in transform.get(key, default)]
        for key, default in (("mean", IMAGENET_DEFAULT_MEAN), ("std", IMAGENET_DEFAULT_STD))
    ]
    about = _about("classification", config, *scaled)
    about |= {"classes": list(predictor.classes), "transform": _plain(transform)}
    side = transform["input_size"]
    size = (side, side) if isinstance(side, int) else tuple(side)[-2:]
    if part == "backbone":
        strides = [info["reduction"] for info in network.feature_info]
        network.prune_intermediate_layers(len(strides), prune_norm=True)
        maps = partial(network.forward_intermediates, intermediates_only=True)
        return Source(_Outputs(network, maps), _of_features(about, strides), size)
    return Source(_Outputs(network, lambda image: (network(image),)), about, size)


def _segmentor(config: str, checkpoint: str, part: str) -> Source:
    from dense.segmentation import load_predictor

    predictor = load_predictor(config, checkpoint)
    segmentor = predictor.segmentor
    given = segmentor.cfg.model.data_preprocessor
    about = _about("segmentation", config, list(given.mean), list(given.std))
    about |= {
        "channels": "RGB" if given.get("bgr_to_rgb") else "BGR",
        "align_corners": segmentor.align_corners,
        "classes": list(predictor.classes),
        "palette": [list(colour) for colour in predictor.palette],
        "resize": _resize(segmentor.cfg.test_pipeline, config),
    }
    size = tuple(given.get("size") or (512, 512))
    if part == "backbone":
        backbone = segmentor.backbone
        return Source(_Outputs(backbone, backbone), _of_features(about, backbone.strides), size)
    if segmentor.test_cfg.mode != "whole" or given.get("test_cfg"):
        raise ExportError(f"{config}: test_cfg has crops or padding; whole images are exported")
    if segmentor.out_channels == 1:
        raise ExportError(f"{config}: a threshold decides on its class; scores of each are needed")

    def logits(image: Tensor) -> tuple[Tensor]:
        return (segmentor.encode_decode(image, [dict(img_shape=tuple(image.shape[2:]))]),)

    return Source(_Outputs(segmentor, logits), about, size)


def _detector(config: str, checkpoint: str, part: str) -> Source:
    import detectron2.data.transforms as T
    from detectron2.config import instantiate

    from dense.detection.cascade import PaperCascadeROIHeads
    from dense.detection.predictor import load_model
    from dense.export.detector import DetectorGraph

    model, cfg, names = load_model(config, checkpoint)
    backbone = getattr(model.backbone, "bottom_up", model.backbone)
    mean, std = (value.flatten().tolist() for value in (model.pixel_mean, model.pixel_std))
    about = _about("detection", backbone.name, mean, std)
    mapper = cfg.dataloader.test.mapper
    steps = instantiate(mapper.augmentations)
    if len(steps) != 1 or not isinstance(steps[0], T.ResizeShortestEdge):
        raise ExportError(f"{config}: of a detector's test, a file holds one ResizeShortestEdge")
    short, long = steps[0].short_edge_length[0], steps[0].max_size
    about |= {"channels": mapper.image_format, "resize": [long, short]}
    size = short, min(long, short * 4 // 3)
    if part == "backbone":
        features = _Outputs(backbone, lambda image: tuple(backbone(image).values()))
        return Source(features, _of_features(about, backbone.strides), size)
    if not isinstance(getattr(model, "roi_heads", None), PaperCascadeROIHeads):
        raise ExportError(f"{config}: of detectors, Cascade R-CNNs of our recipes are exported")
    masks = ["masks"] if model.roi_heads.mask_on else []
    about |= {"classes": names, "outputs": ["boxes", "scores", "classes", *masks], "batch": 1}
    return Source(DetectorGraph(model), about, size)


_READERS = {"classification": _classifier, "segmentation": _segmentor, "detection": _detector}


class _Outputs(nn.Module):
    """A network with one function of it as its forward."""

    def __init__(self, network: nn.Module, compute: Callable[[Tensor], Sequence[Tensor]]):
        super().__init__()
        self.network = network
        self.compute = compute
        self.eval()

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        return tuple(self.compute(image))


def _of_features(about: dict[str, Any], strides: Sequence[int]) -> dict[str, Any]:
    outputs = [f"stage{number}_stride{stride}" for number, stride in enumerate(strides)]
    kept = {key: about[key] for key in ("model", "channels", "mean", "std", "sides")}
    return {"task": "features", "outputs": outputs} | kept


def _about(task: str, config: str, mean: list[float], std: list[float]) -> dict[str, Any]:
    return {
        "task": task,
        "outputs": ["logits"],
        "model": Path(config).stem,
        "channels": "RGB",
        "mean": mean,
        "std": std,
        "sides": [SMALLEST, LARGEST],
    }


def _resize(pipeline: Sequence[dict], config: str) -> list[int] | None:
    """The scale that the test pipeline resizes to, long and short side, None if it does not."""
    scale = None
    for step in pipeline:
        if step["type"] == "Resize" and step.get("keep_ratio") and step.get("scale"):
            scale = list(step["scale"])
        elif step["type"] not in ("LoadImageFromFile", "LoadAnnotations", "PackSegInputs"):
            raise ExportError(
                f"{config}: a file cannot hold the step {step['type']} of its test pipeline"
            )
    return scale


def _plain(value: Any) -> Any:
    """The value as JSON has it."""
    if isinstance(value, dict):
        return {key: _plain(one) for key, one in value.items()}
    return [_plain(one) for one in value] if isinstance(value, list | tuple) else value
