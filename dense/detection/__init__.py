"""The backbones in Detectron2, for LazyConfig and yacs configs, and a predictor.

>>> from dense.detection import PyramidBackbone, add_dense_config
"""

from dense import require

require("detectron2", "detection")

from dense.detection.backbone import PyramidBackbone, add_dense_config  # noqa: E402
from dense.detection.predictor import load_predictor  # noqa: E402

__all__ = ["PyramidBackbone", "add_dense_config", "load_predictor"]
