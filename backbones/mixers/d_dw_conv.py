"""D-DW-Conv: depth-wise convolution with kernels predicted per image."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backbones import ops
from backbones.folding import affine, foldable, parameter
from backbones.layers import Size, is_plain
from backbones.mixers.conv import AROUND, ConvMixer
from backbones.mixers.norm import pooled_batch_norm
from backbones.ops.common import without_autocast


class DynamicDepthwiseConv(ConvMixer):
    """D-DW-Conv: homogeneous dynamic depth-wise convolution (equation 7).

    Global average pooling, linear C to C/4, BN, ReLU and a linear predict one KxK kernel per
    channel and image; the output has a learned bias. If a device trains on one image, the
    predictor's BN uses its running statistics (see :func:`.norm.pooled_batch_norm`).
    """

    marks = ("reduce.weight", "expand.weight", "bias")
    names = {
        "original": (
            (".mixer.reduce.", ".attn2conv.conv.conv1."),
            (".mixer.reduce_norm.", ".attn2conv.conv.bn."),
            (".mixer.expand.", ".attn2conv.conv.conv2."),
            (".mixer.bias", ".attn2conv.conv.bias"),
            *AROUND,
        )
    }

    def __init__(self, dim: int, kernel_size: int | Size = 7):
        super().__init__(dim, kernel_size)
        self.reduce = nn.Linear(dim, dim // 4, bias=False)
        self.reduce_norm = nn.BatchNorm2d(dim // 4)
        self.expand = nn.Linear(dim // 4, dim * self.kernel_size**2)
        self.bias = nn.Parameter(torch.zeros(dim))

    def mix(self, x: Tensor) -> Tensor:
        """``(B, H, W, C)`` to ``(B, H, W, C)``."""
        return ops.dynamic_depthwise_conv(x, self.kernels(x), self.bias)

    def kernels(self, x: Tensor) -> Tensor:
        """Predict the kernels of each image, ``(B, H, W, C)`` to ``(B, C, K, K)``."""
        # Without autocast: pooled values differ little between images, so the batch norm would
        # amplify the rounding of low precision.
        with without_autocast(self.bias):
            pooled = x.mean((1, 2), dtype=self.bias.dtype)
            pooled = pooled_batch_norm(self.reduce_norm, self.reduce(pooled), self.copies)
            hidden = F.relu(pooled)
            kernels = self.expand(hidden)
        return kernels.unflatten(-1, (-1, self.kernel_size, self.kernel_size))

    def fold(self) -> None:
        """Fold all four norms."""
        super().fold()
        self.fold_linear("reduce", "reduce_norm")
        if foldable(self.mid_norm) and is_plain(self.expand, nn.Linear):
            scale, shift = affine(self.mid_norm)
            # K*K consecutive rows of the weight predict one channel's kernel.
            rows = scale.repeat_interleave(self.kernel_size**2)
            expand = self.expand
            expand.weight = parameter(expand.weight * rows[:, None], expand.weight)
            expand.bias = parameter(expand.bias * rows, expand.bias)
            self.bias = parameter(self.bias * scale + shift, self.bias)
            self.mid_norm = nn.Identity().eval()
