"""DW-Conv: depth-wise 7x7 convolution instead of window attention."""

from typing import Self

from torch import Tensor, nn

from backbones import ops
from backbones.folding import affine, foldable, parameter
from backbones.layers import Size, is_plain
from backbones.mixers.base import heads_of
from backbones.mixers.conv import AROUND, ConvMixer, resized
from backbones.mixers.shared_dw_conv import SharedDepthwiseConv


class DepthwiseConv(ConvMixer):
    """DW-Conv: depth-wise convolution with learned kernels and a bias (equation 6)."""

    marks = ("conv.weight",)
    forms = (SharedDepthwiseConv,)
    names = {"original": ((".mixer.conv.", ".attn2conv.conv."), *AROUND)}

    def __init__(self, dim: int, kernel_size: int | Size = 7):
        super().__init__(dim, kernel_size)
        self.conv = nn.Conv2d(dim, dim, self.kernel_size, padding="same", groups=dim)

    @classmethod
    def at(
        cls,
        dim: int,
        stage: int,
        block: int,
        feat_size: Size,
        *,
        window_size: int | Size = 7,
        num_heads: tuple[int, ...] | None = None,
        shared: bool = True,
    ) -> Self | SharedDepthwiseConv:
        """Build the mixer of one block.

        The positional arguments are those of :meth:`.base.Mixer.at`.

        Args:
            window_size: the kernel size.
            num_heads: kernels of each stage, shared by the channels of a head (Table 4); None has
                one per channel.
            shared: whether all positions share the kernels (Table 4); False needs ``num_heads``.

        Raises:
            ValueError: neither channels nor positions would share a kernel, or ``num_heads`` has no
                number for the stage.
        """
        if num_heads is not None:
            return SharedDepthwiseConv(
                dim, heads_of(num_heads, stage), window_size, feat_size, shared
            )
        if not shared:
            raise ValueError("shared=False: kernels of positions need num_heads, as (3, 6, 12, 24)")
        return cls(dim, window_size)

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
            return resized(value, self.kernel_size)
        return value

    def set_kernel_size(self, kernel_size: int) -> None:
        """Resize the kernels in place, bicubic (Table 14)."""
        weight = self.conv.weight
        self.conv.weight = parameter(resized(weight.detach(), kernel_size), weight)
        self.conv.kernel_size = (kernel_size, kernel_size)
        self.kernel_size = kernel_size
