"""MMSegmentation's cross-entropy with class weights on masks that have ignored pixels."""

from typing import Any

from mmseg.models import CrossEntropyLoss
from mmseg.registry import MODELS
from torch import Tensor


@MODELS.register_module()
class WeightedCrossEntropyLoss(CrossEntropyLoss):
    """``CrossEntropyLoss`` with ``class_weight``, where ignored pixels have no weight.

    MMSegmentation's looks up a class weight for the index that is ignored and fails, and divides by
    the weights of all pixels. Here the loss is the mean over the pixels that are not ignored,
    weighted by their classes, as in ``torch.nn.CrossEntropyLoss``.

    >>> loss_decode = dict(type="WeightedCrossEntropyLoss", class_weight=[1.0, 5.0])
    """

    def forward(
        self,
        cls_score: Tensor,
        label: Tensor,
        weight: Tensor | None = None,
        avg_factor: float | None = None,
        reduction_override: str | None = None,
        ignore_index: int = 255,
        **kwargs: Any,
    ) -> Tensor:
        """``(B, classes, H, W)`` scores and ``(B, H, W)`` labels to a scalar."""
        if avg_factor is None and self.class_weight is not None:
            weights = cls_score.new_tensor(self.class_weight)
            seen = label[label != ignore_index]
            # At least a pixel's weight: a crop may have ignored pixels only.
            avg_factor = weights[seen].sum().clamp(min=weights.min())
        return super().forward(
            cls_score,
            label,
            weight,
            avg_factor,
            reduction_override,
            ignore_index=ignore_index,
            **kwargs,
        )
