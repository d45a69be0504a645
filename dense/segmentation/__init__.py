"""Registers the backbones with MMEngine, for MMSegmentation, MMDetection and others.

In a config::

    custom_imports = dict(imports=["dense.segmentation"])
    model = dict(backbone=dict(type="i_d_dw_conv_tiny", drop_path_rate=0.3, init="checkpoint.pth"))

This import needs mmengine only; submodules need MMSegmentation. With mmcv-lite it also provides
replacements of mmcv's compiled operators, see :mod:`dense.openmmlab.mmcv_lite`.
"""

from collections.abc import Callable

import numpy as np

from dense import require

require("mmengine", "segmentation")

from dense.openmmlab import mmcv_lite  # noqa: E402
from dense.openmmlab.backbone import OpenMMLabBackbone, register  # noqa: E402
from dense.openmmlab.logs import forward_logs  # noqa: E402
from dense.openmmlab.optim import DenseOptimWrapperConstructor  # noqa: E402

__all__ = ["DenseOptimWrapperConstructor", "PyramidBackbone", "load_predictor"]

PyramidBackbone = OpenMMLabBackbone

register()
forward_logs()
mmcv_lite.offer()


def load_predictor(
    config_file: str, checkpoint: str, device: str = "cpu"
) -> Callable[[np.ndarray], np.ndarray]:
    """Load a trained segmentor as a function of one image; see :class:`.predictor.Predictor`.

    >>> predict = load_predictor("work_dirs/mine/mine.py", "work_dirs/mine/iter_600.pth")
    >>> predict(image)  # (H, W, 3) uint8 RGB to (H, W) int32 class indices

    Args:
        config_file: the config it was trained with, such as the copy in its work folder.
        checkpoint: a ``.pth`` of the training.
        device: ``"cpu"``, ``"cuda"``, ``"cuda:1"``.

    Raises:
        ImportError: MMSegmentation is not installed.
        ConfigError: the config cannot be read.
        CheckpointError: the checkpoint cannot be read or does not fit.
    """
    require("mmseg", "segmentation")
    from dense.segmentation.predictor import Predictor

    return Predictor(config_file, checkpoint, device)
