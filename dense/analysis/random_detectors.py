"""Small detectors of random weights that find something, to compare exported files with."""

from pathlib import Path

import torch
from torch import nn

from dense import files
from dense.recipes import RECIPES

CLASSES = ("cat", "dog", "bus")
# Boxes move, scores differ, photos have detections.
_SCALES = {
    "cls_score": 1.0,
    "bbox_pred": 0.1,
    "anchor_deltas": 0.1,
    "objectness_logits": 0.1,
    "mask_head": 0.1,
}


def write_detector(folder: Path, family: str, *options: str) -> Path:
    """A Cascade Mask R-CNN nano in a folder, as its training would leave it.

    Args:
        folder: of the config and the checkpoint.
        family: a key of :data:`backbones.families.FAMILIES`.
        *options: overrides of the config.

    Returns:
        The checkpoint.
    """
    from detectron2.config import LazyConfig, instantiate

    from dense.backbone import revert_sync_batchnorm
    from dense.detection.config import load_config

    recipe = str(RECIPES / f"detection/cascade_mask_rcnn_{family}_nano.py")
    cfg = load_config(recipe, [f"model.roi_heads.num_classes={len(CLASSES)}", *options])
    files.write(folder / "config.yaml", lambda partial: LazyConfig.save(cfg, str(partial)))
    torch.manual_seed(0)
    model = revert_sync_batchnorm(instantiate(cfg.model))
    for name, weight in model.named_parameters():
        for part, scale in _SCALES.items():
            if part in name and "weight" in name:
                nn.init.normal_(weight, std=scale)
    content = {"model": model.state_dict(), "classes": list(CLASSES), "trainer": {}, "iteration": 9}
    path = folder / "model_final.pth"
    files.write(path, lambda partial: torch.save(content, partial))
    return path
