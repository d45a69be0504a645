"""The backbones in OpenMMLab's registry, under their names.

In a config of MMSegmentation, MMDetection or any other package on MMEngine::

    custom_imports = dict(imports=["dense.segmentation"])
    model = dict(backbone=dict(type="i_d_dw_conv_tiny", drop_path_rate=0.3, init="checkpoint.pth"))

This import needs mmengine alone; what needs MMSegmentation stands in the modules beside it. Over
mmcv-lite it also offers what stands in for mmcv's compiled operators
(:mod:`dense.openmmlab.mmcv_lite`).
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
    """A trained segmentor as a function of one image; see :class:`.predictor.Predictor`.

    Args:
        config_file: the config it was trained with, such as the one in its work folder.
        checkpoint: the file that training wrote.
        device: ``"cpu"``, ``"cuda"``, ``"cuda:1"``.

    Returns:
        ``(H, W, 3)`` uint8 RGB to ``(H, W)`` int32 class indices, with ``classes``, ``palette``.

    Raises:
        ImportError: MMSegmentation is not installed.
        CheckpointError: the file cannot be read or is not of this model.
    """
    require("mmseg", "segmentation")
    from dense.segmentation.predictor import Predictor

    return Predictor(config_file, checkpoint, device)
