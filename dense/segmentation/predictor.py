"""A trained segmentor as a function of one image."""

import numpy as np
import torch
from mmseg.apis import inference_model, init_model
from mmseg.registry import DATASETS

from backbones import CheckpointError, fuse
from dense.backbone import revert_sync_batchnorm
from dense.openmmlab import checkpoints
from dense.segmentation.config import load_config


class Predictor:
    """Label maps of images, by the test pipeline of the segmentor's config.

    Attributes:
        classes: names, by index of the label map.
        palette: one RGB colour a class.
        report: what the checkpoint filled.
    """

    def __init__(self, config_file: str, checkpoint: str, device: str = "cpu"):
        cfg = load_config(config_file)
        content = checkpoints.read(checkpoint)
        self._model = init_model(cfg, device="cpu")
        with checkpoints.refusing(checkpoint):
            weights = content["state_dict"]
        self.report = checkpoints.load_whole(self._model, weights, checkpoint)
        names, palette = _classes(content.get("meta", {}), cfg.test_dataloader.dataset)
        if len(names) != self._model.num_classes:
            raise CheckpointError(
                f"{checkpoint} names {len(names)} classes, the model has {self._model.num_classes}"
            )
        self.classes = tuple(names)
        self.palette = tuple(tuple(int(v) for v in colour) for colour in palette)
        self._model = fuse(revert_sync_batchnorm(self._model).to(device), inplace=True)

    def __call__(self, image: np.ndarray) -> np.ndarray:
        """``(H, W, 3)`` uint8 RGB to ``(H, W)`` int32 class indices."""
        if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
            raise ValueError(
                f"an image of shape {image.shape}, {image.dtype}: (H, W, 3), uint8 is needed"
            )
        # MMSegmentation reads files as BGR and turns them in its data preprocessor.
        result = inference_model(self._model, np.ascontiguousarray(image[..., ::-1]))
        return result.pred_sem_seg.data[0].to(torch.int32).cpu().numpy()


def _classes(meta: dict, dataset: dict) -> tuple:
    """Names and colours of a checkpoint, or of the config's dataset where it has none.

    MMSegmentation before 1.0 wrote them in capitals.
    """
    meta = meta.get("dataset_meta", meta)
    for names, palette in (("classes", "palette"), ("CLASSES", "PALETTE")):
        if meta.get(names) and meta.get(palette):
            return meta[names], meta[palette]
    meta = dataset.get("metainfo") or DATASETS.get(dataset["type"]).METAINFO
    return meta["classes"], meta["palette"]
