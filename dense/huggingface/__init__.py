"""The networks as classes of transformers: ``AutoBackbone``, image classification, safetensors.

Importing this package registers them:

>>> import dense.huggingface
>>> from transformers import AutoBackbone, AutoConfig, AutoModel
>>> config = AutoConfig.for_model("dense_backbone", backbone="i_d_dw_conv_tiny")
>>> backbone = AutoBackbone.from_config(config)
>>> backbone.save_pretrained("folder")
>>> backbone = AutoModel.from_pretrained("folder")

From a folder, transformers' ``AutoBackbone.from_pretrained`` reads no network, its own neither: it
asks the Hub first. ``AutoModel`` and ``DenseBackboneModel`` do.
"""

from dense import require

require("transformers", "ecosystem")

from transformers import (  # noqa: E402
    AutoBackbone,
    AutoConfig,
    AutoModel,
    AutoModelForImageClassification,
)

from dense.huggingface.configuration import DenseBackboneConfig  # noqa: E402
from dense.huggingface.modeling import (  # noqa: E402
    DenseBackboneForImageClassification,
    DenseBackboneModel,
)

__all__ = ["DenseBackboneConfig", "DenseBackboneForImageClassification", "DenseBackboneModel"]

AutoConfig.register(DenseBackboneConfig.model_type, DenseBackboneConfig)
AutoBackbone.register(DenseBackboneConfig, DenseBackboneModel)
AutoModel.register(DenseBackboneConfig, DenseBackboneModel)
AutoModelForImageClassification.register(DenseBackboneConfig, DenseBackboneForImageClassification)
