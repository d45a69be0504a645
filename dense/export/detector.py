"""Detectron2's Cascade Mask R-CNN of one image as a function of tensors, for one graph."""

from collections.abc import Sequence
from copy import deepcopy
from math import isqrt

import torch
import torch.nn.functional as F
from detectron2.modeling.meta_arch import GeneralizedRCNN
from detectron2.modeling.poolers import ROIPooler
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.fusion import fuse_conv_bn_weights
from torchvision.ops import nms

Features = dict[str, Tensor]


class DetectorGraph(nn.Module):
    """A detector's inference without what cannot be in a graph: lists of ``Instances``.

    The layers are the detector's own. The number of boxes depends on the image and may be zero;
    of several images, each box's would have to travel through all heads.

    Args:
        model: with :class:`dense.detection.cascade.PaperCascadeROIHeads`, in evaluation mode.
    """

    images = 1

    def __init__(self, model: GeneralizedRCNN):
        super().__init__()
        self.model = model
        self.box_heads = nn.ModuleList(map(_folded, model.roi_heads.box_head))
        self.eval()

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        """``(1, 3, H, W)``, normalised, to the detections, best first.

        Returns:
            Boxes ``(N, 4)`` in pixels of ``image``, scores ``(N,)``, classes ``(N,)``, and, with a
            mask head, the probabilities of masks in their boxes, ``(N, M, M)``.
        """
        model, size = self.model, image.shape[2:]
        multiple = model.backbone.size_divisibility
        # Of positive numbers: engines round the quotient of a negative one up, not down.
        below, right = (multiple - 1 - (side - 1) % multiple for side in size)
        features = model.backbone(F.pad(image, (0, right, 0, below)))
        proposals = self._proposals(features, size)
        boxes, scores, classes = self._detections(features, proposals, size)
        found = boxes, scores, classes
        return (*found, self._masks(features, boxes, classes)) if model.roi_heads.mask_on else found

    def _proposals(self, features: Features, size: Sequence[int]) -> Tensor:
        """As ``find_top_rpn_proposals``: ``(N, 4)``, best first."""
        rpn = self.model.proposal_generator
        maps = [features[name] for name in rpn.in_features]
        anchors = rpn.anchor_generator(maps)
        boxes, scores = [], []
        for own, logits, deltas in zip(anchors, *rpn.rpn_head(maps), strict=True):
            logits = logits[0].permute(1, 2, 0).flatten()
            deltas = deltas[0].unflatten(0, (-1, 4)).permute(2, 3, 0, 1).flatten(0, 2)
            best, places = logits.topk(torch.sym_min(logits.shape[0], rpn.pre_nms_topk[False]))
            decoded = rpn.box2box_transform.apply_deltas(deltas[places], own.tensor[places])
            valid = decoded.isfinite().all(1) & best.isfinite()
            decoded = clipped(decoded, size)
            valid &= ((decoded[:, 2:] - decoded[:, :2]) > rpn.min_box_size).all(1)
            decoded, best = decoded[valid], best[valid]
            kept = _alone(decoded, best, rpn.nms_thresh)
            boxes.append(decoded[kept])
            scores.append(best[kept])
        order = _first(torch.cat(scores).argsort(descending=True), rpn.post_nms_topk[False])
        return torch.cat(boxes)[order]

    def _detections(
        self, features: Features, boxes: Tensor, size: Sequence[int]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """As ``PaperCascadeROIHeads._forward_box``."""
        heads = self.model.roi_heads
        maps = [features[name] for name in heads.box_in_features]
        logits = []
        for head, predictor in zip(self.box_heads, heads.box_predictor, strict=True):
            scores, deltas = predictor(head(pooled(heads.box_pooler, maps, boxes)))
            logits.append(scores)
            refined = predictor.box2box_transform.apply_deltas(deltas, boxes).unflatten(1, (-1, 4))
            refined = clipped(refined, size)
            boxes = refined[:, 0] if refined.shape[1] == 1 else _of_class(refined, scores)
        scores = torch.stack(logits).mean(0).softmax(1)
        return _best(refined, scores, predictor, size)

    def _masks(self, features: Features, boxes: Tensor, classes: Tensor) -> Tensor:
        """As ``PaperCascadeROIHeads._forward_mask``."""
        heads = self.model.roi_heads
        maps = [features[name] for name in heads.mask_in_features]
        regions = pooled(heads.mask_pooler, maps, boxes)
        masks = []
        for head in [heads.mask_head] if heads.shared_heads else heads.mask_head:
            logits = head.layers(regions)
            of_class = torch.zeros_like(classes) if logits.shape[1] == 1 else classes
            masks.append(logits[torch.arange(logits.shape[0]), of_class].sigmoid())
        return torch.stack(masks).mean(0)


def clipped(boxes: Tensor, size: Sequence[int]) -> Tensor:
    """Boxes ``(..., 4)`` within an image of ``size`` rows and columns."""
    height, width = size
    x1, y1, x2, y2 = boxes.unbind(-1)
    x1, x2 = (x.clamp(min=0, max=width) for x in (x1, x2))
    y1, y2 = (y.clamp(min=0, max=height) for y in (y1, y2))
    return torch.stack((x1, y1, x2, y2), -1)


def pooled(pooler: ROIPooler, maps: Sequence[Tensor], boxes: Tensor) -> Tensor:
    """The maps in boxes ``(N, 4)``, ``(N, C, S, S)``: each from the level of its size."""
    levels = _levels(pooler, boxes)
    regions = torch.cat([torch.zeros_like(boxes[:, :1]), boxes], 1)
    parts = [
        align(own, regions[levels == level])
        for level, (own, align) in enumerate(zip(maps, pooler.level_poolers, strict=True))
    ]
    # Each box's place among all: by level, then by its own.
    count = boxes.shape[0]
    by_level = (levels * count + torch.arange(count)).argsort()
    return torch.cat(parts)[by_level.argsort()]


def _folded(head: nn.Module) -> nn.Module:
    """A copy with batch norms in their convolutions: PyTorch's asks for the number of boxes."""
    head = deepcopy(head)
    for conv in head.modules():
        if isinstance(norm := getattr(conv, "norm", None), _BatchNorm):
            statistics = norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias
            conv.weight, conv.bias = fuse_conv_bn_weights(conv.weight, conv.bias, *statistics)
            conv.norm = None
    return head


def _levels(pooler: ROIPooler, boxes: Tensor) -> Tensor:
    """As ``assign_boxes_to_levels``."""
    sizes = (boxes[:, 2:] - boxes[:, :2]).prod(1).sqrt()
    levels = pooler.canonical_level + (sizes / pooler.canonical_box_size + 1e-8).log2()
    return levels.floor().clamp(pooler.min_level, pooler.max_level) - pooler.min_level


def _first(places: Tensor, most: int) -> Tensor:
    """At most so many; a slice's length would be of unknown sign to torch.export."""
    return places[torch.arange(places.shape[0]) < most]


def _alone(boxes: Tensor, scores: Tensor, threshold: float) -> Tensor:
    """Of boxes ``(N, 4)``, which ones NMS keeps, ``(N,)``; how many it keeps has no known bound."""
    places = nms(boxes, scores, threshold)
    return torch.zeros_like(scores, dtype=torch.bool).scatter(0, places, True)


def _of_class(boxes: Tensor, scores: Tensor) -> Tensor:
    likeliest = scores[:, :-1].argmax(1)
    return boxes[torch.arange(boxes.shape[0]), likeliest]


def _best(
    boxes: Tensor, scores: Tensor, predictor: nn.Module, size: Sequence[int]
) -> tuple[Tensor, Tensor, Tensor]:
    """As ``fast_rcnn_inference_single_image``."""
    valid = boxes.isfinite().all(2).all(1) & scores.isfinite().all(1)
    scores, count = torch.where(valid[:, None], scores, 0)[:, :-1], scores.shape[1] - 1
    rows, classes = (scores > predictor.test_score_thresh).nonzero(as_tuple=True)
    scores = scores[rows, classes]
    boxes = boxes[rows, 0 if boxes.shape[1] == 1 else classes]
    # Boxes of different classes are moved apart, as in torchvision's batched_nms; over a square, as
    # rounding of the eightieth class's in a row would decide on boxes of 30 pixels.
    across = isqrt(count - 1) + 1
    cells = torch.stack((classes % across, classes // across), 1) - across // 2
    apart = cells.to(boxes) * (torch.sym_max(*size) + 1)
    kept = _alone(boxes + apart.repeat(1, 2), scores, predictor.test_nms_thresh)
    boxes, scores, classes = boxes[kept], scores[kept], classes[kept]
    best = _first(scores.argsort(descending=True), predictor.test_topk_per_image)
    return boxes[best], scores[best], classes[best]
