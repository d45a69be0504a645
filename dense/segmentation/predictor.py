"""Predictor for segmentors trained in MMSegmentation."""

import numpy as np
import torch
from mmseg.apis import inference_model, init_model
from mmseg.registry import DATASETS

from backbones import CheckpointError, fuse
from dense.backbone import revert_sync_batchnorm
from dense.images import check_rgb
from dense.openmmlab import checkpoints
from dense.segmentation.config import load_config


class Predictor:
    """A trained segmentor as a function of one image, with the config's test pipeline.

    Attributes:
        classes: class names, by index.
        palette: an RGB colour per class, 0 to 255.
        report: the load report of the checkpoint.
        segmentor: MMSegmentation's, fused, with its config as ``cfg``.
    """

    def __init__(self, config_file: str, checkpoint: str, device: str = "cpu"):
        cfg = load_config(config_file)
        self.segmentor = init_model(cfg, device="cpu")
        content, self.report = checkpoints.load_whole(self.segmentor, checkpoint)
        dataset = cfg.test_dataloader.dataset
        about = checkpoints.metainfo(content, dataset, DATASETS, ("classes", "palette"))
        names, palette = about["classes"], about["palette"]
        count = self.segmentor.num_classes
        if len(names) != count:
            raise CheckpointError(f"{checkpoint} names {len(names)} classes, the model has {count}")
        self.classes = tuple(names)
        self.palette = tuple(tuple(int(v) for v in colour) for colour in palette)
        self.segmentor = fuse(revert_sync_batchnorm(self.segmentor).to(device), inplace=True)

    def __call__(self, image: np.ndarray) -> np.ndarray:
        """``(H, W, 3)`` uint8 RGB to ``(H, W)`` int32 class indices."""
        check_rgb(image)
        # MMSegmentation expects BGR input, which its data preprocessor converts to RGB.
        result = inference_model(self.segmentor, np.ascontiguousarray(image[..., ::-1]))
        return result.pred_sem_seg.data[0].to(torch.int32).cpu().numpy()
