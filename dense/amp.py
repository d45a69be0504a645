"""Mixed precision: the half precision of a device, and a warning where float16 is risky."""

import logging

import torch
from torch import nn

from backbones.mixers import InhomogeneousDynamicDepthwiseConv

_logger = logging.getLogger(__name__)


def best_half() -> str:
    """``"bfloat16"`` if the GPU computes in it, else ``"float16"``."""
    # Emulated, as on a V100, bfloat16 is slower than float32.
    native = torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
    return "bfloat16" if native else "float16"


def warn_of_float16(model: nn.Module, dtype: torch.dtype, option: str) -> None:
    """Log a warning if a model with I-D-DW-Conv is to be trained in float16.

    Args:
        model: a classifier, detector or segmentor.
        dtype: autocast's.
        option: the option that sets it, such as ``"train.amp.precision"``.
    """
    if dtype == torch.float16 and any(
        isinstance(module, InhomogeneousDynamicDepthwiseConv) for module in model.modules()
    ):
        _logger.warning(
            "float16 AMP with I-D-DW-Conv, which its authors trained without AMP: "
            f"{option}=bfloat16, or no AMP, is safer"
        )
