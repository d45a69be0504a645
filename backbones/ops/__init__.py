"""Operators on channels-last maps: spatial mixing, and linear layers for inference.

The spatial operators take and return maps ``(B, H, W, C)``; ``linear`` and ``mlp`` work on the last
axis of any tensor. Each call picks a backend (:mod:`backbones.ops.dispatch`); the README beside
this file lists them. :mod:`backbones.ops.reference` defines the results in plain PyTorch.
"""

import torch

from backbones.ops import flops as flops  # registers the FLOP formulas
from backbones.ops.aggregation import inhomogeneous_aggregation
from backbones.ops.common import leaf
from backbones.ops.convolutional import convolutional_attention
from backbones.ops.depthwise import depthwise_conv, dynamic_depthwise_conv
from backbones.ops.dispatch import force as force
from backbones.ops.inhomogeneous import inhomogeneous_dynamic_depthwise_conv
from backbones.ops.linear import linear, mlp
from backbones.ops.sliding import sliding_attention
from backbones.ops.window import local_mlp, window_attention

__all__ = [
    "convolutional_attention",
    "depthwise_conv",
    "dynamic_depthwise_conv",
    "inhomogeneous_aggregation",
    "inhomogeneous_dynamic_depthwise_conv",
    "linear",
    "local_mlp",
    "mlp",
    "sliding_attention",
    "window_attention",
]

# torch.fx keeps them as calls: what they do depends on sizes, devices and dtypes.
for _name in __all__:
    leaf(globals()[_name])
    torch.fx.wrap(_name)
