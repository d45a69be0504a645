"""Parameters and FLOPs of backbones, detectors and segmentors.

A FLOP is a multiply-add, as in the paper. fvcore counts PyTorch's operators. The operators of
:mod:`backbones.ops` are counted by :mod:`backbones.ops.flops`, independent of the backend, and are
not computed while counting.

Detectors are counted as MMDetection's tool counted the paper's: backbone, FPN and RPN at 1280x800,
1000 boxes in each stage of the cascade, 100 in each mask head, without RoI pooling. Segmentors are
counted at 512x2048; the auxiliary head adds parameters but no FLOPs, since inference skips it.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from math import prod
from pathlib import Path
from typing import NamedTuple

import timm
import torch
from fvcore.nn import FlopCountAnalysis
from fvcore.nn.jit_handles import conv_flop_count, get_shape
from torch import Tensor, nn

from backbones import ops
from backbones.ops.flops import MULTIPLY_ADDS
from dense import require
from dense.backbone import revert_sync_batchnorm

DETECTOR_INPUT = (1, 3, 800, 1280)
SEGMENTOR_INPUT = (1, 3, 512, 2048)
BOXES, MASKS = 1000, 100

_counted: dict[tuple, int] = {}


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
    """Multiply-adds of a forward pass in evaluation mode; the result is cached.

    Args:
        model: on the CPU, or on ``meta``, from which it is materialised with zeros.
        shapes: shapes of the input tensors, batch first.

    Example:
        >>> flops(timm.create_model("dw_conv_nano"), (1, 3, 224, 224))
    """
    sizes = tuple((name, tensor.shape) for name, tensor in model.state_dict().items())
    key = (repr(model), sizes, shapes)
    if key not in _counted:
        if any(p.is_meta for p in model.parameters()):
            model = _zeros(model)
        analysis = FlopCountAnalysis(model.eval(), tuple(torch.zeros(shape) for shape in shapes))
        analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False)
        analysis.set_op_handle(_OPERATOR, _mixing_flops)
        analysis.set_op_handle("aten::scaled_dot_product_attention", _attention_flops)
        analysis.set_op_handle("aten::_convolution_mode", _same_convolution_flops)
        with torch.no_grad(), _operators_counted():
            _counted[key] = int(analysis.total())
    return _counted[key]


def classifier(
    name: str, img_size: int = 224, window_size: int = 7, with_flops: bool = True
) -> Count:
    """Count a classifier of 1000 classes on one image of ``img_size`` x ``img_size`` pixels."""
    with torch.device("meta"):
        model = timm.create_model(name, img_size=img_size, window_size=window_size)
    shape = (1, 3, img_size, img_size)
    return Count(parameters(model), flops(model, shape) if with_flops else None)


def segmentor(config: str | Path, with_flops: bool = True) -> Count:
    """Count the segmentor of an MMSegmentation config."""
    require("mmseg", "segmentation")
    model = _openmmlab_model(config)
    count = None
    if with_flops:
        count = flops(model.backbone, SEGMENTOR_INPUT)
        count += flops(
            _OnFeatures(model.decode_head), *_feature_shapes(model.backbone, SEGMENTOR_INPUT)
        )
    return Count(parameters(model), count)


def mmdet_detector(config: str | Path, with_flops: bool = True) -> Count:
    """Count the detector of an MMDetection config."""
    require("mmdet", "mmdetection")
    model = _openmmlab_model(config)
    count = None
    if with_flops:
        rois = model.roi_head
        count = flops(model.backbone, DETECTOR_INPUT)
        proposals = _OnFeatures(nn.Sequential(model.neck, model.rpn_head))
        count += flops(proposals, *_feature_shapes(model.backbone, DETECTOR_INPUT))
        channels = model.neck.out_channels
        for box_head, mask_head in zip(rois.bbox_head, rois.mask_head, strict=True):
            count += flops(box_head, (BOXES, channels, 7, 7))
            count += flops(mask_head, (MASKS, channels, 14, 14))
    return Count(parameters(model), count)


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
        model = revert_sync_batchnorm(instantiate(load_config(str(config)).model))
    size = parameters(model)
    pyramid, heads = model.backbone, model.roi_heads
    mask_layers = nn.Sequential(*heads.mask_head.children())
    stages = len(heads.box_head)

    total = mask_flops = box_flops = None
    classes, inputs = heads.num_classes, heads.box_predictor[0].bbox_pred.in_features
    if with_flops:
        channels = pyramid.output_shape()["p2"].channels
        mask_flops = flops(mask_layers, (MASKS, channels, 14, 14))
        box_flops = stages * (classes - 1) * 4 * inputs * BOXES
        total = flops(pyramid.bottom_up, DETECTOR_INPUT) + mask_flops
        shapes = _feature_shapes(pyramid.bottom_up, DETECTOR_INPUT)
        total += flops(_Proposals(pyramid, model.proposal_generator.rpn_head), *shapes)
        for box_head, predictor in zip(heads.box_head, heads.box_predictor, strict=True):
            total += flops(nn.Sequential(box_head, predictor), (BOXES, channels, 7, 7))
    more = {
        "two more mask heads": Count(
            (stages - 1) * parameters(mask_layers),
            (stages - 1) * mask_flops if with_flops else None,
        ),
        "a box for each class": Count(stages * (classes - 1) * 4 * (inputs + 1), box_flops),
    }
    return Count(size, total), more


class _OnFeatures(nn.Module):
    """A head that takes the feature maps as one tuple."""

    def __init__(self, head: nn.Module):
        super().__init__()
        self.head = head

    def forward(self, *features: Tensor):
        return self.head(features)


class _Proposals(nn.Module):
    """Detectron2's FPN without its bottom-up backbone, and the RPN head."""

    def __init__(self, pyramid: nn.Module, rpn_head: nn.Module):
        super().__init__()
        pyramid.bottom_up = nn.Identity()
        self.pyramid, self.rpn_head = pyramid, rpn_head

    def forward(self, *features: Tensor):
        named = dict(zip(self.pyramid.in_features, features, strict=True))
        return self.rpn_head(list(self.pyramid(named).values()))


def _openmmlab_model(config: str | Path) -> nn.Module:
    from mmengine.config import Config
    from mmengine.registry import MODELS, DefaultScope

    cfg = Config.fromfile(config)
    scope = cfg.default_scope
    with DefaultScope.overwrite_default_scope(scope), torch.device("meta"):
        import_module(f"{scope}.models")
        return revert_sync_batchnorm(MODELS.build(cfg.model))


def _zeros(model: nn.Module) -> nn.Module:
    """Materialise a meta model on the CPU with zeros, which are valid as indices."""
    model = model.to_empty(device="cpu")
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.detach().zero_()
    return model


def _feature_shapes(backbone: nn.Module, shape: tuple[int, ...]) -> list[tuple[int, ...]]:
    """Shapes of a dense backbone's feature maps for an input of ``shape``."""
    batch, _, height, width = shape
    return [
        (batch, channels, -(-height // stride), -(-width // stride))
        for channels, stride in zip(backbone.channels, backbone.strides, strict=True)
    ]


@torch.library.custom_op("dense_complexity::mix", mutates_args=())
def _mix(x: Tensor, others: list[Tensor], channels: int, multiply_adds: int) -> Tensor:
    """Stands in for an operator while counting: an output of its shape, and its cost.

    ``others`` are the operator's other tensor inputs: passing them keeps what computes them in the
    traced graph, so that it is counted.
    """
    return x.new_zeros((*x.shape[:-1], channels))


_OPERATOR = "dense_complexity::mix"


def _mixing_flops(inputs: list, outputs: list) -> int:
    return inputs[3].toIValue()


def _attention_flops(inputs: list, outputs: list) -> int:
    """``q k^T`` and ``a v`` of ``scaled_dot_product_attention``."""
    query, key, value = (get_shape(each) for each in inputs[:3])
    return prod(query[:-1]) * key[-2] * (query[-1] + value[-1])


def _same_convolution_flops(inputs: list, outputs: list) -> int:
    """A convolution with ``padding="same"``, which fvcore does not count."""
    return conv_flop_count(*map(get_shape, (inputs[0], inputs[1], outputs[0])))


def _stand_in(name: str) -> Callable[..., Tensor]:
    """A function with the arguments and the cost of an operator."""

    def stand_in(x: Tensor, *args) -> Tensor:
        shapes = [tuple(map(int, a.shape)) if isinstance(a, Tensor) else a for a in (x, *args)]
        # window_attention takes q, k and v in one map of 3C channels and returns C channels.
        channels = shapes[0][-1] // 3 if name == "window_attention" else shapes[0][-1]
        others = [a for a in args if isinstance(a, Tensor)]
        return _mix(x, others, channels, MULTIPLY_ADDS[name](*shapes))

    return stand_in


@contextmanager
def _operators_counted() -> Iterator[None]:
    """Replace the operators of :mod:`backbones.ops` with their stand-ins."""
    real = {name: getattr(ops, name) for name in MULTIPLY_ADDS}
    for name in real:
        setattr(ops, name, _stand_in(name))
    try:
        yield
    finally:
        for name, operator in real.items():
            setattr(ops, name, operator)
