"""MMDetection's test-time augmentation for detectors that predict masks too: of their boxes."""

from typing import Any

from mmdet.models import DetTTAModel
from mmdet.registry import MODELS


@MODELS.register_module()
class BoxTTAModel(DetTTAModel):
    """MMDetection's DetTTAModel, which refuses masks, around any detector: no masks are predicted.

    >>> tta_model = dict(type="BoxTTAModel", tta_cfg=dict(nms=..., max_per_img=100))
    """

    def test_step(self, data: Any) -> list:
        """The merged detections of each image, without masks."""
        heads = getattr(self.module, "roi_head", None)
        if not getattr(heads, "with_mask", False):
            return super().test_step(data)
        mask_head, heads.mask_head = heads.mask_head, None
        try:
            return super().test_step(data)
        finally:
            heads.mask_head = mask_head
