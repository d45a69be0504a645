"""Parameters and FLOPs of backbones, detectors and segmentors.

A FLOP is a multiply-add, as in the paper. PyTorch's counter counts its own operators, on the meta
device, where nothing is computed. The operators of :mod:`backbones.ops` are counted by
:mod:`backbones.ops.flops`, independent of the backend.

Detectors are counted as MMDetection's tool counted the paper's: backbone, FPN and RPN at 1280x800,
1000 boxes in each stage of the cascade, 100 in each mask head, without RoI pooling. Segmentors are
counted at 512x2048; the auxiliary head adds parameters but no FLOPs, since inference skips it.
"""

from collections.abc import Callable
from copy import deepcopy
from importlib import import_module
from math import prod
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import timm
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from backbones import ops
from backbones.ops.flops import MULTIPLY_ADDS
from dense import require
from dense.backbone import revert_sync_batchnorm

DETECTOR_INPUT = (1, 3, 800, 1280)
SEGMENTOR_INPUT = (1, 3, 512, 2048)
BOXES, MASKS = 1000, 100

# What PyTorch's counter leaves out, in FLOPs of two a multiply-add, with fvcore's figures.
_aten = torch.ops.aten
_MORE = {
    _aten._native_batch_norm_legit_no_training: lambda x, *_, **__: 2 * 2 * prod(x),
    _aten.native_layer_norm: lambda x, *_, **__: 2 * 5 * prod(x),
    _aten.native_group_norm: lambda x, *_, **__: 2 * 5 * prod(x),
    # Nearest upsampling, which the counter decomposes.
    _aten._unsafe_index: lambda *_, out_shape, **__: 2 * prod(out_shape),
    _aten.upsample_bilinear2d: lambda *_, out_shape, **__: 2 * 4 * prod(out_shape),
    _aten._adaptive_avg_pool2d: lambda x, *_, **__: 2 * prod(x),
    # Adaptive pooling to 1x1; a mean that keeps no dimension is not counted.
    _aten.mean: lambda x, dim=(), keepdim=False, **__: 2 * prod(x) if keepdim else 0,
}


class Count(NamedTuple):
    """Parameters, and multiply-adds for one image (None: not counted)."""

    parameters: int
    flops: int | None

    def __add__(self, other: "Count") -> "Count":
        flops = None if self.flops is None or other.flops is None else self.flops + other.flops
        return Count(self.parameters + other.parameters, flops)


def parameters(model: nn.Module) -> int:
    """The number of parameters, frozen ones included, without buffers."""
    return sum(p.numel() for p in model.parameters())


def flops(model: nn.Module, *shapes: tuple[int, ...]) -> int:
    """Multiply-adds of a forward pass in evaluation mode, from shapes alone: nothing is computed.

    Args:
        model: on any device; it is not changed.
        shapes: shapes of the input tensors, batch first.

    Example:
        >>> flops(timm.create_model("dw_conv_nano"), (1, 3, 224, 224))
    """
    model = deepcopy(model).to("meta").eval()
    return _multiply_adds(lambda: model(*map(_meta, shapes)))


def classifier(
    name: str,
    img_size: int = 224,
    window_size: int | None = 7,
    with_flops: bool = True,
    **options: Any,
) -> Count:
    """Count a classifier of 1000 classes on one image of ``img_size`` x ``img_size`` pixels.

    ``window_size=None`` leaves that argument out, for networks that have none; ``options`` are
    other arguments of the network.
    """
    if window_size is not None:
        options["window_size"] = window_size
    with torch.device("meta"):
        model = timm.create_model(name, img_size=img_size, **options)
    shape = (1, 3, img_size, img_size)
    return Count(parameters(model), flops(model, shape) if with_flops else None)


def segmentor(config: str | Path, with_flops: bool = True) -> Count:
    """Count the segmentor of an MMSegmentation config."""
    require("mmseg", "segmentation")
    model = _openmmlab_model(config)

    def forward() -> None:
        model.decode_head(model.backbone(_meta(SEGMENTOR_INPUT)))

    return Count(parameters(model), _multiply_adds(forward) if with_flops else None)


def mmdet_detector(config: str | Path, with_flops: bool = True) -> Count:
    """Count the detector of an MMDetection config."""
    require("mmdet", "mmdetection")
    model = _openmmlab_model(config)

    def forward() -> None:
        model.rpn_head(model.neck(model.backbone(_meta(DETECTOR_INPUT))))
        channels, heads = model.neck.out_channels, model.roi_head
        for box_head, mask_head in zip(heads.bbox_head, heads.mask_head, strict=True):
            box_head(_meta((BOXES, channels, 7, 7)))
            mask_head(_meta((MASKS, channels, 14, 14)))

    return Count(parameters(model), _multiply_adds(forward) if with_flops else None)


def detectron2_detector(
    config: str | Path, with_flops: bool = True
) -> tuple[Count, dict[str, Count]]:
    """Count the detector of a Detectron2 LazyConfig.

    Returns:
        The detector's count, and by name the counts of what MMDetection's cascade has in addition:
        a mask head in every stage (Detectron2 has one in all) and class-specific boxes.
    """
    require("detectron2", "detection")
    from detectron2.config import instantiate

    from dense.detection.config import load_config

    with torch.device("meta"):
        model = revert_sync_batchnorm(instantiate(load_config(str(config)).model)).eval()
    heads, channels = model.roi_heads, model.backbone.output_shape()["p2"].channels
    mask_layers = nn.Sequential(*heads.mask_head.children())

    def masks() -> None:
        mask_layers(_meta((MASKS, channels, 14, 14)))

    def forward() -> None:
        features = model.backbone(_meta(DETECTOR_INPUT))
        model.proposal_generator.rpn_head(list(features.values()))
        for box_head, predictor in zip(heads.box_head, heads.box_predictor, strict=True):
            predictor(box_head(_meta((BOXES, channels, 7, 7))))
        masks()

    stages = len(heads.box_head)
    inputs = heads.box_predictor[0].bbox_pred.in_features
    boxes = stages * (heads.num_classes - 1) * 4
    total = mask_flops = box_flops = None
    if with_flops:
        total, box_flops = _multiply_adds(forward), boxes * inputs * BOXES
        mask_flops = (stages - 1) * _multiply_adds(masks)
    return Count(parameters(model), total), {
        "two more mask heads": Count((stages - 1) * parameters(mask_layers), mask_flops),
        "a box for each class": Count(boxes * (inputs + 1), box_flops),
    }


def _openmmlab_model(config: str | Path) -> nn.Module:
    from mmengine.config import Config
    from mmengine.registry import MODELS, DefaultScope

    cfg = Config.fromfile(config)
    scope = cfg.default_scope
    with DefaultScope.overwrite_default_scope(scope), torch.device("meta"):
        import_module(f"{scope}.models")
        return revert_sync_batchnorm(MODELS.build(cfg.model)).eval()


def _shape(argument: object) -> object:
    return tuple(argument.shape) if isinstance(argument, Tensor) else argument


def _meta(shape: tuple[int, ...]) -> Tensor:
    """A tensor without values."""
    return torch.empty(shape, device="meta")


@torch.no_grad()
def _multiply_adds(forward: Callable[[], object]) -> int:
    """Count what ``forward`` runs on the meta device."""
    own = 0

    def stand_in(name: str) -> Callable[..., Tensor]:
        """A function with the arguments and the result's shape of an operator, that adds its cost.

        On the meta device, an operator itself would run some backend's products.
        """

        def operator(*args, **kwargs) -> Tensor:
            nonlocal own
            x = args[0]
            shapes = [_shape(a) for a in args]
            own += MULTIPLY_ADDS[name](*shapes, **{key: _shape(a) for key, a in kwargs.items()})
            # Attention takes q, k and v in one map of 3C channels and returns C channels.
            return x.chunk(3, -1)[0] if name.endswith("attention") else x

        return operator

    counter = FlopCounterMode(display=False, custom_mapping=_MORE)
    with patch.multiple(ops, **{name: stand_in(name) for name in MULTIPLY_ADDS}), counter:
        forward()
    return own + counter.get_total_flops() // 2
