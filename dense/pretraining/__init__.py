"""ImageNet pretraining: timm's data and augmentation on mmengine's Runner.

Importing this module registers the types that ``configs/pretraining`` uses.
"""

from dense import require

require("mmengine", "pretraining")

from dense.openmmlab.logs import forward_logs  # noqa: E402
from dense.pretraining.data import ImageDataset, ImageStream  # noqa: E402
from dense.pretraining.hooks import ProgressBar  # noqa: E402
from dense.pretraining.metric import ClassificationMetric  # noqa: E402
from dense.pretraining.model import ImageClassifier  # noqa: E402

__all__ = ["ClassificationMetric", "ImageClassifier", "ImageDataset", "ImageStream", "ProgressBar"]

forward_logs()
