"""DW-Conv: depth-wise 7x7 convolution instead of window attention."""

import torch.nn.functional as F
from torch import Tensor, nn

from backbones import ops
from backbones.folding import affine, foldable, parameter
from backbones.layers import Size, is_plain
from backbones.mixers.conv import AROUND, ConvMixer


class DepthwiseConv(ConvMixer):
    """DW-Conv: depth-wise convolution with learned kernels and a bias (equation 6)."""

    marks = ("conv.weight",)
    names = {"original": ((".mixer.conv.", ".attn2conv.conv."), *AROUND)}

    def __init__(self, dim: int, kernel_size: int | Size = 7):
        super().__init__(dim, kernel_size)
        self.conv = nn.Conv2d(dim, dim, self.kernel_size, padding="same", groups=dim)

    def mix(self, x: Tensor) -> Tensor:
        """``(B, H, W, C)`` to ``(B, H, W, C)``."""
        if is_plain(self.conv, nn.Conv2d):
            return ops.depthwise_conv(x, self.conv.weight, self.conv.bias)
        return self.conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)

    def fold(self) -> None:
        """Fold all three norms."""
        super().fold()
        if foldable(self.mid_norm) and is_plain(self.conv, nn.Conv2d):
            scale, shift = affine(self.mid_norm)
            weight = self.conv.weight * scale[:, None, None, None]
            self.conv.weight = parameter(weight, self.conv.weight)
            self.conv.bias = parameter(self.conv.bias * scale + shift, self.conv.bias)
            self.mid_norm = nn.Identity().eval()

    def fit(self, name: str, value: Tensor) -> Tensor:
        """Resize kernels of another size, bicubic (Table 14)."""
        if name == "conv.weight" and value.shape[:2] == self.conv.weight.shape[:2]:
            return _resized(value, self.kernel_size)
        return value

    def set_kernel_size(self, kernel_size: int) -> None:
        """Resize the kernels in place, bicubic (Table 14)."""
        weight = self.conv.weight
        self.conv.weight = parameter(_resized(weight.detach(), kernel_size), weight)
        self.conv.kernel_size = (kernel_size, kernel_size)
        self.kernel_size = kernel_size


def _resized(kernels: Tensor, size: int) -> Tensor:
    return F.interpolate(kernels, (size, size), mode="bicubic", align_corners=False)
