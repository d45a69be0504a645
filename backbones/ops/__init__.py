"""The operators that mix pixels, one function each, on channels-last maps.

Every function takes and returns ``(B, H, W, C)``; each is the single place where its operator is
computed, so a faster backend can be put behind the name without touching a module. The plain forms
that define them stand in :mod:`backbones.ops.reference`.
"""

from backbones.ops import flops as flops  # registers their costs
from backbones.ops.aggregation import inhomogeneous_aggregation
from backbones.ops.depthwise import depthwise_conv, dynamic_depthwise_conv
from backbones.ops.dispatch import force as force
from backbones.ops.inhomogeneous import inhomogeneous_dynamic_depthwise_conv
from backbones.ops.linear import linear, mlp
from backbones.ops.window import local_mlp, window_attention

__all__ = [
    "depthwise_conv",
    "dynamic_depthwise_conv",
    "inhomogeneous_aggregation",
    "inhomogeneous_dynamic_depthwise_conv",
    "linear",
    "local_mlp",
    "mlp",
    "window_attention",
]
