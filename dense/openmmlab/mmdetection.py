"""Predictor for detectors trained in MMDetection.

Training does not need this module: ``custom_imports = dict(imports=["dense.segmentation"])``
registers the backbones and needs mmengine only.
"""

from collections.abc import Callable

import numpy as np
import torch
from mmengine.config import Config

from backbones import CheckpointError, fuse
from dense import require
from dense.backbone import revert_sync_batchnorm
from dense.images import check_rgb
from dense.openmmlab import checkpoints, mmcv_lite

require("mmdet", "mmdetection")
mmcv_lite.offer()

from mmdet.apis import inference_detector, init_detector  # noqa: E402
from mmdet.registry import DATASETS  # noqa: E402


def load_predictor(
    config_file: str, checkpoint: str, device: str = "cpu"
) -> Callable[[np.ndarray], dict]:
    """Load a trained MMDetection detector as a function of one image.

    >>> predict = load_predictor("work_dirs/mine/mine.py", "work_dirs/mine/epoch_36.pth")
    >>> predict(image)["boxes"]  # image: (H, W, 3), uint8, RGB

    Args:
        config_file: the MMDetection config it was trained with.
        checkpoint: MMDetection's ``.pth``, or an authors' released Cascade Mask R-CNN.
        device: ``"cpu"``, ``"cuda"``, ``"cuda:1"``.

    Returns:
        A function like the one of :func:`dense.detection.load_predictor`; its attribute ``report``
        is the load report.

    Raises:
        CheckpointError: the checkpoint cannot be read or does not fit.
    """
    cfg = Config.fromfile(config_file)
    # Prediction must not require the pretraining file.
    cfg.model.backbone.pop("init", None)
    model = revert_sync_batchnorm(init_detector(cfg, device="cpu"))
    content, report = checkpoints.load_whole(model, checkpoint)
    dataset = cfg.test_dataloader.dataset
    names = list(checkpoints.metainfo(content, dataset, DATASETS, ("classes",))["classes"])
    head = model.bbox_head if hasattr(model, "bbox_head") else model.roi_head.bbox_head
    count = int((head[-1] if isinstance(head, torch.nn.ModuleList) else head).num_classes)
    if len(names) != count:
        raise CheckpointError(f"{checkpoint} names {len(names)} classes, the model has {count}")
    fuse(model.to(device), inplace=True)

    @torch.inference_mode()
    def predict(image: np.ndarray) -> dict:
        check_rgb(image)
        # MMDetection expects BGR input, which its data preprocessor converts to RGB.
        result = inference_detector(model, np.ascontiguousarray(image[..., ::-1]))
        found = result.pred_instances.cpu()
        found = found[found.scores.argsort(descending=True)]
        return {
            "boxes": found.bboxes.numpy(),
            "scores": found.scores.numpy(),
            "classes": found.labels.numpy(),
            "masks": np.asarray(found.masks) if "masks" in found else None,
            "class_names": names,
        }

    predict.report = report
    return predict
