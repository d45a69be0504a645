"""Cascade R-CNN's heads in Detectron2, trained and evaluated as in MMDetection."""

from collections.abc import Sequence
from typing import Any

import torch
from detectron2.modeling.roi_heads import CascadeROIHeads, MaskRCNNConvUpsampleHead
from detectron2.modeling.roi_heads.roi_heads import select_foreground_proposals
from detectron2.structures import Boxes, ImageList, Instances
from detectron2.utils.events import get_event_storage
from torch import Tensor, nn

Features = dict[str, Tensor]


class PaperCascadeROIHeads(CascadeROIHeads):
    """Detectron2's cascade with the rules of MMDetection's, which the paper used.

    In training, each stage samples from the boxes of the stage before (the first: the RPN's) and
    the objects. Its losses have a weight; gradients of the stages are summed. (Detectron2 samples
    once, weights stages equally and divides their gradients by the number of stages.) In
    evaluation, logits are averaged over the stages, not probabilities.

    Args:
        stage_loss_weights: weight of each stage's losses.
        shared_heads: True: one mask head for all stages, trained on the first stage's samples.
            False, as in the paper: ``mask_head`` is a list of one head for each stage; in
            evaluation, their probabilities are averaged.
        **kwargs: arguments of ``CascadeROIHeads``. From class-specific box predictors, the next
            stage takes the box of the object's class, for background that of the likeliest class.

    Raises:
        ValueError: the number of weights or mask heads is not that of the stages.
    """

    def __init__(
        self,
        *,
        stage_loss_weights: Sequence[float] = (1.0, 0.5, 0.25),
        shared_heads: bool = True,
        **kwargs: Any,
    ):
        # Each stage adds the objects itself.
        super().__init__(proposal_append_gt=False, **kwargs)
        self.stage_loss_weights, self.shared_heads = list(stage_loss_weights), shared_heads
        counts = {"stage_loss_weights": len(self.stage_loss_weights)}
        if self.mask_on and not shared_heads:
            counts["mask_head"] = len(self.mask_head)
        for name, count in counts.items():
            if count != self.num_cascade_stages:
                raise ValueError(
                    f"{name} has {count} entries, the cascade {self.num_cascade_stages} stages"
                )

    def forward(
        self,
        images: ImageList,
        features: Features,
        proposals: list[Instances],
        targets: list[Instances] | None = None,
    ) -> tuple[list[Instances], dict[str, Tensor]]:
        """As in ``CascadeROIHeads``: the first stage's samples and the losses, or detections."""
        if not self.training:
            return super().forward(images, features, proposals)
        maps = [features[name] for name in self.box_in_features]
        boxes = [given.proposal_boxes.tensor for given in proposals]
        losses, sampled = {}, []
        for stage, weight in enumerate(self.stage_loss_weights):
            with get_event_storage().name_scope(f"stage{stage}"):
                samples = self._sample(boxes, targets, stage)
                predictions = self._run_stage(maps, samples, stage)
                own = self.box_predictor[stage].losses(predictions, samples)
                if self.mask_on and not self.shared_heads:
                    own |= self._mask_losses(features, samples, self.mask_head[stage])
            losses |= {f"{name}_stage{stage}": weight * loss for name, loss in own.items()}
            refined = self._refine(predictions, samples, stage)
            boxes = [b[~s.is_object] for b, s in zip(refined, samples, strict=True)]
            sampled.append(samples)
        if self.mask_on and self.shared_heads:
            losses |= self._mask_losses(features, sampled[0], self.mask_head)
        losses |= self._forward_keypoint(features, sampled[0])
        return sampled[0], losses

    def _sample(self, boxes: list[Tensor], targets: list[Instances], stage: int) -> list[Instances]:
        """Sample from the boxes and the objects, matched by the stage's IoU threshold."""
        proposals = []
        for own, objects in zip(boxes, targets, strict=True):
            given = Instances(objects.image_size)
            given.proposal_boxes = Boxes(torch.cat([objects.gt_boxes.tensor, own]))
            given.is_object = torch.arange(len(given), device=own.device) < len(objects)
            proposals.append(given)
        self.proposal_matcher = self.proposal_matchers[stage]
        return self.label_and_sample_proposals(proposals, targets)

    def _run_stage(self, features: list[Tensor], proposals: list[Instances], stage: int):
        regions = self.box_pooler(features, [given.proposal_boxes for given in proposals])
        return self.box_predictor[stage](self.box_head[stage](regions))

    @torch.no_grad()
    def _refine(
        self, predictions: tuple[Tensor, Tensor], proposals: list[Instances], stage: int
    ) -> list[Tensor]:
        """A stage's boxes ``(N, 4)`` in each image, clipped; of one class each."""
        likeliest = predictions[0][:, :-1].argmax(1).split([len(given) for given in proposals])
        boxes = self.box_predictor[stage].predict_boxes(predictions, proposals)
        refined = []
        for own, classes, given in zip(boxes, likeliest, proposals, strict=True):
            if given.has("gt_classes"):
                is_background = given.gt_classes == self.num_classes
                classes = torch.where(is_background, classes, given.gt_classes)
            own = own.unflatten(1, (-1, 4))
            if own.shape[1] == 1:
                classes = torch.zeros_like(classes)
            chosen = Boxes(own[torch.arange(len(own), device=own.device), classes])
            chosen.clip(given.image_size)
            refined.append(chosen.tensor)
        return refined

    def _forward_box(
        self, features: Features, proposals: list[Instances], targets: None = None
    ) -> list[Instances]:
        """Detections of the last stage, in evaluation."""
        maps = [features[name] for name in self.box_in_features]
        logits = []
        for stage in range(self.num_cascade_stages):
            predictions = self._run_stage(maps, proposals, stage)
            logits.append(predictions[0])
            if stage + 1 < self.num_cascade_stages:
                boxes = self._refine(predictions, proposals, stage)
                proposals = [
                    Instances(given.image_size, proposal_boxes=Boxes(own))
                    for given, own in zip(proposals, boxes, strict=True)
                ]
        mean = torch.stack(logits).mean(0)
        return self.box_predictor[-1].inference((mean, predictions[1]), proposals)[0]

    def _mask_losses(
        self, features: Features, samples: list[Instances], head: nn.Module
    ) -> dict[str, Tensor]:
        foreground, _ = select_foreground_proposals(samples, self.num_classes)
        return head(self._mask_regions(features, foreground, "proposal_boxes"), foreground)

    def _forward_mask(self, features: Features, instances: list[Instances]) -> list[Instances]:
        """Add the masks to the detections, in evaluation."""
        if self.shared_heads or not self.mask_on:
            return super()._forward_mask(features, instances)
        regions = self._mask_regions(features, instances, "pred_boxes")
        masks = []
        for head in self.mask_head:
            head(regions, instances)
            masks.append([found.pred_masks for found in instances])
        for found, own in zip(instances, zip(*masks, strict=True), strict=True):
            found.pred_masks = torch.stack(own).mean(0)
        return instances

    def _mask_regions(self, features: Features, instances: list[Instances], boxes: str) -> Tensor:
        maps = [features[name] for name in self.mask_in_features]
        return self.mask_pooler(maps, [given.get(boxes) for given in instances])


def mask_heads(*, shared: bool, stages: int = 3, **kwargs: Any) -> nn.Module:
    """Detectron2's mask head: one for all stages, or a ``ModuleList`` of one for each.

    Args:
        shared: one for all stages.
        stages: number of stages.
        **kwargs: arguments of ``MaskRCNNConvUpsampleHead``.
    """
    if shared:
        return MaskRCNNConvUpsampleHead(**kwargs)
    return nn.ModuleList(MaskRCNNConvUpsampleHead(**kwargs) for _ in range(stages))
