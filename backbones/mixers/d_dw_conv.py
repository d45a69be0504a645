"""D-DW-Conv: depth-wise convolution whose kernels are predicted once an image."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backbones import ops
from backbones.layers import Linear
from backbones.mixers.dw_conv import ConvMixer
from backbones.mixers.norm import pooled_batch_norm
from backbones.ops.window import Size


class DynamicDepthwiseConv(ConvMixer):
    """Homogeneous dynamic depth-wise convolution (equation 7).

    Global average pool, linear C to C/4, BN, ReLU, linear to one KxK kernel a channel, used at
    every position of that image; plus a learned output bias. With one image on a device the
    predictor's BN uses its running statistics in training too, since one value has no variance.
    """

    def __init__(self, dim: int, kernel_size: int | Size = 7):
        super().__init__(dim, kernel_size)
        self.reduce = Linear(dim, dim // 4, bias=False)
        self.reduce_norm = nn.BatchNorm2d(dim // 4)
        self.expand = Linear(dim // 4, dim * self.kernel_size**2)
        self.bias = nn.Parameter(torch.zeros(dim))

    def mix(self, x: Tensor) -> Tensor:
        """``(B, H, W, C)`` to ``(B, H, W, C)``."""
        return ops.dynamic_depthwise_conv(x, self.kernels(x), self.bias)

    def kernels(self, x: Tensor) -> Tensor:
        """The kernels for each image, ``(B, H, W, C)`` to ``(B, C, K, K)``."""
        # Outside of autocast: pooled maps differ little from image to image, and the norm blows up
        # those differences, with whatever rounding there is in them.
        with torch.autocast(x.device.type, enabled=False):
            pooled = x.mean((1, 2), dtype=self.reduce.weight.dtype)
            hidden = F.relu(pooled_batch_norm(self.reduce_norm, self.reduce(pooled)))
            kernels = self.expand(hidden)
        return kernels.unflatten(-1, (-1, self.kernel_size, self.kernel_size))
