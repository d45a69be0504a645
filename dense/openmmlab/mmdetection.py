"""A detector trained in MMDetection as a function of one image.

Training in MMDetection does without it: ``custom_imports = dict(imports=["dense.segmentation"])``
registers the backbones and needs mmengine alone.
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
    """A trained detector, ready to look at images.

    Args:
        config_file: the MMDetection config it was trained with.
        checkpoint: a ``.pth`` of MMDetection, the authors' released Cascade Mask R-CNN files too.
        device: where it runs.

    Returns:
        A function as :func:`dense.detection.load_predictor` returns it, with the ``report`` of what
        the checkpoint filled.

    Raises:
        CheckpointError: the checkpoint cannot be read or does not fit.
    """
    cfg = Config.fromfile(config_file)
    content = checkpoints.read(checkpoint)
    with checkpoints.refusing(checkpoint):
        weights = content["state_dict"]
    # Its pretraining file is not needed to look at images.
    cfg.model.backbone.pop("init", None)
    model = revert_sync_batchnorm(init_detector(cfg, device="cpu"))
    report = checkpoints.load_whole(model, weights, checkpoint)
    dataset = cfg.test_dataloader.dataset
    names = list(checkpoints.metainfo(content, dataset, DATASETS, ("classes",))["classes"])
    count = int(model.bbox_head.num_classes if hasattr(model, "bbox_head") else _classes_of(model))
    if len(names) != count:
        raise CheckpointError(f"{checkpoint} names {len(names)} classes, the model has {count}")
    fuse(model.to(device), inplace=True)

    @torch.inference_mode()
    def predict(image: np.ndarray) -> dict:
        check_rgb(image)
        # MMDetection reads files as BGR and turns them in its data preprocessor.
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


def _classes_of(model: torch.nn.Module) -> int:
    head = model.roi_head.bbox_head
    return (head[-1] if isinstance(head, torch.nn.ModuleList) else head).num_classes
