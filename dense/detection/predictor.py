"""Predictor for detectors trained in Detectron2."""

from collections.abc import Callable
from pathlib import Path

import detectron2.data.transforms as T
import numpy as np
import torch
from detectron2.config import instantiate
from detectron2.data import MetadataCatalog
from omegaconf import DictConfig, OmegaConf
from torch import nn

from backbones import fuse
from dense.backbone import revert_sync_batchnorm
from dense.detection.checkpoint import WholeCheckpointer
from dense.detection.config import load_config
from dense.images import check_rgb


def load_predictor(
    config_file: str | None, checkpoint: str, device: str | torch.device = "cpu"
) -> Callable[[np.ndarray], dict]:
    """Load a trained detector as a function of one image.

    >>> predict = load_predictor(None, "work_dirs/mine/model_final.pth")
    >>> predict(image)["boxes"]  # image: (H, W, 3), uint8, RGB

    Args:
        config_file: the LazyConfig or ``config.yaml`` it was trained with; None takes the
            ``config.yaml`` beside the checkpoint.
        checkpoint: a ``.pth`` of the trainer.
        device: ``"cpu"``, ``"cuda"``, ``"cuda:1"``.

    Returns:
        A function of an RGB image ``(H, W, 3)``, uint8. It returns a dict, detections sorted by
        descending score: ``boxes`` ``(N, 4)`` float32, x1, y1, x2, y2 in pixels of the image;
        ``scores`` ``(N,)`` float32; ``classes`` ``(N,)`` int64, indices into ``class_names`` (list
        of str); ``masks`` ``(N, H, W)`` bool, None without a mask head.

    Raises:
        LazyConfigError: the config cannot be read.
        CheckpointError: the checkpoint cannot be read or does not fit.
    """
    model, cfg, names = load_model(config_file, checkpoint, device)
    mapper = cfg.dataloader.test.mapper
    resize = T.AugmentationList(instantiate(mapper.augmentations))
    bgr = mapper.image_format == "BGR"

    @torch.inference_mode()
    def predict(image: np.ndarray) -> dict:
        check_rgb(image)
        height, width = image.shape[:2]
        seen = T.AugInput(image[:, :, ::-1] if bgr else image)
        resize(seen)
        pixels = torch.from_numpy(np.ascontiguousarray(seen.image.transpose(2, 0, 1)))
        found = model([{"image": pixels, "height": height, "width": width}])[0]["instances"]
        found = found.to("cpu")
        return {
            "boxes": found.pred_boxes.tensor.numpy(),
            "scores": found.scores.numpy(),
            "classes": found.pred_classes.numpy(),
            "masks": found.pred_masks.numpy() if found.has("pred_masks") else None,
            "class_names": names,
        }

    return predict


def load_model(
    config_file: str | None, checkpoint: str, device: str | torch.device = "cpu"
) -> tuple[nn.Module, DictConfig, list[str]]:
    """Load a trained detector as :func:`load_predictor` does.

    Returns:
        The model in evaluation mode, its config and the class names.
    """
    cfg = load_config(config_file or str(Path(checkpoint).parent / "config.yaml"))
    names = _class_names(cfg, checkpoint)
    model = revert_sync_batchnorm(instantiate(cfg.model)).to(device).eval()
    WholeCheckpointer(model).load_weights(checkpoint, complete=True)
    fuse(model, inplace=True)
    return model, cfg, names


def _class_names(cfg: DictConfig, checkpoint: str) -> list[str]:
    """The checkpoint's class names; also sets the number of classes in ``cfg`` to match."""
    names = WholeCheckpointer.read_classes(checkpoint)
    if names is None:
        names = OmegaConf.select(cfg, "dataloader.metadata.classes")
    for key in ("model.roi_heads.num_classes", "model.num_classes"):
        count = OmegaConf.select(cfg, key)
        if count is None:
            continue
        if names is None:
            coco = MetadataCatalog.get("coco_2017_val").thing_classes
            names = coco if count == len(coco) else [f"class {i}" for i in range(count)]
        OmegaConf.update(cfg, key, len(names))
    return list(names or [])
