"""Backbones for dense prediction: five pixel mixers in one Swin-shaped pyramid.

Importing this package registers the models with timm:

>>> import backbones, timm
>>> model = timm.create_model("i_d_dw_conv_tiny", num_classes=1000, drop_path_rate=0.2)
"""

import backbones.hosts  # noqa: F401  (registers them)
import backbones.models  # noqa: F401
from backbones.checkpoints import LoadReport, load_checkpoint
from backbones.families import FAMILIES, MODEL_NAMES
from backbones.fusion import fuse
from backbones.pyramid import Pyramid
from backbones.reading import CheckpointError, read_checkpoint

__all__ = [
    "FAMILIES",
    "MODEL_NAMES",
    "CheckpointError",
    "LoadReport",
    "Pyramid",
    "fuse",
    "load_checkpoint",
    "read_checkpoint",
]
