"""DW-Conv: a depth-wise 7x7 convolution in the place of window attention."""

import torch.nn.functional as F
from timm.layers import to_2tuple
from torch import Tensor, nn

from backbones import ops
from backbones.layers import Linear
from backbones.mixers.norm import batch_norm
from backbones.ops.window import Size


class ConvMixer(nn.Module):
    """The bottleneck of the convolutional families: linear, BN, ReLU, mix, BN, ReLU, linear, BN.

    The linears have no bias. Nothing is padded to windows (appendix D).

    Args:
        dim: C.
        kernel_size: rows and columns of the kernel, both the same.
    """

    norm_layer = nn.BatchNorm2d

    def __init__(self, dim: int, kernel_size: int | Size = 7):
        super().__init__()
        self.kernel_size = _square(kernel_size)
        self.in_proj = Linear(dim, dim, bias=False)
        self.in_norm = nn.BatchNorm2d(dim)
        self.mid_norm = nn.BatchNorm2d(dim)
        self.out_proj = Linear(dim, dim, bias=False)
        self.out_norm = nn.BatchNorm2d(dim)

    def forward(self, x: Tensor) -> Tensor:
        """``(B, H, W, C)`` to ``(B, H, W, C)``, any H and W."""
        x = F.relu(batch_norm(self.in_norm, self.in_proj(x)))
        x = F.relu(batch_norm(self.mid_norm, self.mix(x)))
        return batch_norm(self.out_norm, self.out_proj(x))

    def mix(self, x: Tensor) -> Tensor:
        """The spatial operator, ``(B, H, W, C)`` to ``(B, H, W, C)``."""
        raise NotImplementedError(f"{type(self).__name__} must say how it mixes positions")

    def set_kernel_size(self, kernel_size: int) -> None:
        """Change the kernel, learned weights upsampled to it (Table 14)."""
        raise ValueError(
            f"{type(self).__name__} predicts its kernels and cannot be resized from "
            f"{self.kernel_size} to {kernel_size}: build it with window_size={kernel_size}"
        )

    def set_input_size(self, feat_size: Size, window_size: int | Size | None = None) -> None:
        """Nothing depends on the size of the map; ``window_size`` is the kernel size."""
        if window_size is not None and _square(window_size) != self.kernel_size:
            self.set_kernel_size(_square(window_size))


class DepthwiseConv(ConvMixer):
    """Depth-wise convolution with learned kernels and a bias (equation 6)."""

    def __init__(self, dim: int, kernel_size: int | Size = 7):
        super().__init__(dim, kernel_size)
        self.conv = nn.Conv2d(dim, dim, self.kernel_size, padding="same", groups=dim)

    def mix(self, x: Tensor) -> Tensor:
        """``(B, H, W, C)`` to ``(B, H, W, C)``."""
        return ops.depthwise_conv(x, self.conv.weight, self.conv.bias)

    def set_kernel_size(self, kernel_size: int) -> None:
        """Change the kernel, its weights upsampled bicubically (Table 14)."""
        weight = F.interpolate(
            self.conv.weight.detach(),
            (kernel_size, kernel_size),
            mode="bicubic",
            align_corners=False,
        )
        self.conv.weight = nn.Parameter(weight, requires_grad=self.conv.weight.requires_grad)
        self.conv.kernel_size = (kernel_size, kernel_size)
        self.kernel_size = kernel_size


def _square(kernel_size: int | Size) -> int:
    rows, columns = to_2tuple(kernel_size)
    if rows != columns:
        raise ValueError(f"kernel of {rows}x{columns}: rows and columns must be the same")
    return rows
