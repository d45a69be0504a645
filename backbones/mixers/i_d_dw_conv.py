"""I-D-DW-Conv: depth-wise convolution whose kernels are predicted at every position."""

import torch.nn.functional as F
from torch import Tensor, nn

from backbones import ops
from backbones.layers import Linear
from backbones.mixers.dw_conv import ConvMixer
from backbones.mixers.norm import batch_norm
from backbones.ops.window import Size


class InhomogeneousDynamicDepthwiseConv(ConvMixer):
    """Inhomogeneous dynamic depth-wise convolution (equation 8).

    Linear C to C/4, BN, ReLU, linear to one KxK kernel for each group of channels, at every
    position by itself; no output bias. The paper's "3 and 4 channels in each group" are those of
    stage 1: 32 groups in every stage give its parameter counts.

    Args:
        num_groups: kernels predicted at a position; C/num_groups channels share one.
    """

    def __init__(self, dim: int, kernel_size: int | Size = 7, num_groups: int = 32):
        super().__init__(dim, kernel_size)
        if dim % num_groups:
            raise ValueError(f"num_groups={num_groups} does not divide the {dim} channels")
        self.reduce = Linear(dim, dim // 4)
        self.reduce_norm = nn.BatchNorm2d(dim // 4)
        self.expand = Linear(dim // 4, num_groups * self.kernel_size**2)

    def mix(self, x: Tensor) -> Tensor:
        """``(B, H, W, C)`` to ``(B, H, W, C)``."""
        hidden = F.relu(batch_norm(self.reduce_norm, self.reduce(x)))
        return ops.inhomogeneous_dynamic_depthwise_conv(
            x, hidden, self.expand.weight, self.expand.bias, self.kernel_size
        )
