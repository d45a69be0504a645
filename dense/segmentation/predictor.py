"""A trained segmentor as a function of one image."""

import numpy as np
import torch
from mmseg.apis import inference_model, init_model

from dense.backbone import step_back_norms
from dense.openmmlab import checkpoints
from dense.segmentation.config import load_config


class Predictor:
    """Label maps of images, by the test pipeline of the segmentor's config.

    Attributes:
        classes: names, by index of the label map.
        palette: one RGB colour a class.
    """

    def __init__(self, config_file: str, checkpoint: str, device: str = "cpu"):
        cfg = load_config(config_file)
        content = checkpoints.read(checkpoint)
        self._model = init_model(cfg, device="cpu")
        with checkpoints.refusing(checkpoint):
            self._model.load_state_dict(content["state_dict"])
            meta = content["meta"]["dataset_meta"]
        self.classes = tuple(meta["classes"])
        self.palette = tuple(tuple(int(v) for v in colour) for colour in meta["palette"])
        self._model = step_back_norms(self._model).to(device).eval()

    def __call__(self, image: np.ndarray) -> np.ndarray:
        """``(H, W, 3)`` uint8 RGB to ``(H, W)`` int32 class indices."""
        if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
            raise ValueError(
                f"an image of shape {image.shape}, {image.dtype}: (H, W, 3), uint8 is needed"
            )
        # MMSegmentation reads files as BGR and turns them in its data preprocessor.
        result = inference_model(self._model, np.ascontiguousarray(image[..., ::-1]))
        return result.pred_sem_seg.data[0].to(torch.int32).cpu().numpy()
