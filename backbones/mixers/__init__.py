"""The pixel mixers, one file each, all on ``(B, H, W, C)`` maps."""

from backbones.mixers.base import Mixer
from backbones.mixers.d_dw_conv import DynamicDepthwiseConv
from backbones.mixers.dw_conv import DepthwiseConv
from backbones.mixers.i_d_dw_conv import InhomogeneousDynamicDepthwiseConv
from backbones.mixers.local_mlp import LocalMLP
from backbones.mixers.shared_dw_conv import SharedDepthwiseConv
from backbones.mixers.sliding_attention import SlidingAttention
from backbones.mixers.window_attention import WindowAttention

__all__ = [
    "DepthwiseConv",
    "DynamicDepthwiseConv",
    "InhomogeneousDynamicDepthwiseConv",
    "LocalMLP",
    "Mixer",
    "SharedDepthwiseConv",
    "SlidingAttention",
    "WindowAttention",
]
