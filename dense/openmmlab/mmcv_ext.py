"""Stand-in for ``mmcv._ext``, mmcv's compiled operators, built on torchvision and PyTorch.

mmcv has no wheel for current PyTorch, but MMSegmentation and MMDetection always import its compiled
module. :mod:`dense.openmmlab.mmcv_lite` adds this file to ``mmcv-lite``, which lacks that module;
it must therefore import nothing of this package.

It has the operators of Mask R-CNN, Cascade Mask R-CNN, RetinaNet, UPerNet and Mask2Former, on every
device that torchvision supports; any other operator raises :class:`NotImplementedError` when
called. Names, arguments and in-place results are those of mmcv 2.1, but strided tensors work too.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
import torchvision  # noqa: F401  (registers torch.ops.torchvision)
from torch import Tensor

_VERSION = "2.1.0"


def nms(boxes: Tensor, scores: Tensor, iou_threshold: float, offset: int) -> Tensor:
    """Non-maximum suppression: indices of the kept boxes, by descending score.

    Args:
        boxes: ``(N, 4)``, as left, top, right, bottom, in pixels.
        scores: ``(N,)``.
        iou_threshold: a box is dropped if its IoU with a better one is larger.
        offset: 1 if right and bottom are inclusive pixel indices, else 0.
    """
    boxes, scores = _widened(boxes), _widened(scores)
    boxes = boxes + boxes.new_tensor([0, 0, offset, offset]) if offset else boxes
    return torch.ops.torchvision.nms(boxes, scores, iou_threshold)


def roi_align_forward(
    input: Tensor,
    rois: Tensor,
    output: Tensor,
    argmax_y: Tensor,
    argmax_x: Tensor,
    aligned_height: int,
    aligned_width: int,
    spatial_scale: float,
    sampling_ratio: int,
    pool_mode: int,
    aligned: bool,
) -> None:
    """Write RoIAlign's result to ``output``, ``(K, C, aligned_height, aligned_width)``.

    Args:
        input: ``(B, C, H, W)``.
        rois: ``(K, 5)``: batch index, then left, top, right, bottom in pixels of the image.
        pool_mode: 1, average pooling; 0, max pooling, raises NotImplementedError.
    """
    _refuse_maximum(pool_mode)
    size = aligned_height, aligned_width
    maps = _widened(input)
    pooled = torch.ops.torchvision.roi_align(
        maps, rois.to(maps.dtype), spatial_scale, *size, sampling_ratio, aligned
    )
    output.copy_(pooled)


def roi_align_backward(
    grad_output: Tensor,
    rois: Tensor,
    argmax_y: Tensor,
    argmax_x: Tensor,
    grad_input: Tensor,
    aligned_height: int,
    aligned_width: int,
    spatial_scale: float,
    sampling_ratio: int,
    pool_mode: int,
    aligned: bool,
) -> None:
    """Write RoIAlign's input gradient to ``grad_input``, ``(B, C, H, W)``."""
    _refuse_maximum(pool_mode)
    size = aligned_height, aligned_width
    grad_output = _widened(grad_output)
    gradient = torch.ops.torchvision._roi_align_backward(
        grad_output,
        rois.to(grad_output.dtype),
        spatial_scale,
        *size,
        *grad_input.shape,
        sampling_ratio,
        aligned,
    )
    grad_input.copy_(gradient)


def sigmoid_focal_loss_forward(
    input: Tensor, target: Tensor, weight: Tensor, output: Tensor, gamma: float, alpha: float
) -> None:
    """Write the focal loss (arXiv 1708.02002, equation 5) to ``output``, ``(N, classes)``.

    Args:
        input: ``(N, classes)`` logits.
        target: ``(N,)`` class indices; the index ``classes`` is the background.
        weight: ``(classes,)``, a factor per target class; empty for none.
    """
    p = input.sigmoid()
    of_positive = -alpha * (1 - p) ** gamma * F.logsigmoid(input)
    of_negative = -(1 - alpha) * p**gamma * F.logsigmoid(-input)
    output.copy_(_by_target(of_positive, of_negative, target, weight))


def sigmoid_focal_loss_backward(
    input: Tensor, target: Tensor, weight: Tensor, grad_input: Tensor, gamma: float, alpha: float
) -> None:
    """Write the gradient of the summed focal loss to ``grad_input``, ``(N, classes)``."""
    p = input.sigmoid()
    of_positive = -alpha * (1 - p) ** gamma * (1 - p - gamma * p * F.logsigmoid(input))
    of_negative = (1 - alpha) * p**gamma * (p - gamma * (1 - p) * F.logsigmoid(-input))
    grad_input.copy_(_by_target(of_positive, of_negative, target, weight))


def ms_deform_attn_forward(
    value: Tensor,
    value_spatial_shapes: Tensor,
    value_level_start_index: Tensor,
    sampling_locations: Tensor,
    attention_weights: Tensor,
    im2col_step: int,
) -> Tensor:
    """Multi-scale deformable attention (arXiv 2010.04159, equation 3): ``(B, queries, heads * D)``.

    Args:
        value: ``(B, keys, heads, D)``, levels concatenated along ``keys``.
        value_spatial_shapes: ``(levels, 2)``, rows and columns.
        value_level_start_index, im2col_step: ignored.
        sampling_locations: ``(B, queries, heads, levels, points, 2)``, x and y from 0 to 1.
        attention_weights: ``(B, queries, heads, levels, points)``.
    """
    return _deform_attn(value_spatial_shapes)(value, sampling_locations, attention_weights)


def ms_deform_attn_backward(
    value: Tensor,
    value_spatial_shapes: Tensor,
    value_level_start_index: Tensor,
    sampling_locations: Tensor,
    attention_weights: Tensor,
    grad_output: Tensor,
    grad_value: Tensor,
    grad_sampling_loc: Tensor,
    grad_attn_weight: Tensor,
    im2col_step: int,
) -> None:
    """Write the gradients of the three inputs to the three ``grad_*`` outputs."""
    inputs = value, sampling_locations, attention_weights
    with torch.enable_grad():
        leaves = [x.detach().requires_grad_() for x in inputs]
        sampled = _deform_attn(value_spatial_shapes)(*leaves)
    gradients = torch.autograd.grad(sampled, leaves, grad_output)
    for out, gradient in zip(
        (grad_value, grad_sampling_loc, grad_attn_weight), gradients, strict=True
    ):
        out.copy_(gradient)


def get_compiler_version() -> str:
    """Text for mmcv's environment report."""
    return "none: torchvision's operators stand in"


def get_compiling_cuda_version() -> str:
    """Text for mmcv's environment report."""
    return f"torchvision's, of CUDA {torch.version.cuda}" if torch.version.cuda else "none"


def __getattr__(name: str) -> Callable:
    """Any other operator: importing mmcv looks all of them up, only calling one raises."""
    if name.startswith("__"):
        raise AttributeError(name)

    def absent(*args, **kwargs):
        raise NotImplementedError(_absent(name))

    absent.__name__ = name
    return absent


def _absent(operator: str) -> str:
    return (
        f"{operator} is one of mmcv's compiled operators, and this is mmcv-lite: compile mmcv by "
        "`make setup MMCV=compiled`, or in an environment of your own by `pip uninstall mmcv-lite` "
        f"and `MMCV_WITH_OPS=1 pip install --no-build-isolation mmcv=={_VERSION}`"
    )


def _widened(x: Tensor) -> Tensor:
    """Promote to float32 at least: torchvision has no bfloat16 kernels."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _refuse_maximum(pool_mode: int) -> None:
    if pool_mode != 1:
        raise NotImplementedError(_absent("roi_align with pool_mode='max'"))


def _by_target(positive: Tensor, negative: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    classes = torch.arange(positive.shape[1], device=positive.device)
    chosen = torch.where(target[:, None] == classes, positive, negative)
    # The background has weight 1.
    return chosen * F.pad(weight, (0, 1), value=1.0)[target, None] if len(weight) else chosen


def _deform_attn(value_spatial_shapes: Tensor) -> Callable:
    # Imported late: mmcv.ops imports this module.
    from mmcv.ops.multi_scale_deform_attn import multi_scale_deformable_attn_pytorch

    shapes = value_spatial_shapes.tolist()
    return lambda value, *others: multi_scale_deformable_attn_pytorch(value, shapes, *others)
