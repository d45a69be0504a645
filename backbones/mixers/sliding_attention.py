"""Sliding attention (Table 5), and the convolutional attention of appendix C that stands on it."""

from collections.abc import Mapping
from functools import partial

import torch
import torch.nn.functional as F
from timm.layers import to_2tuple, trunc_normal_
from torch import Tensor, nn

from backbones import ops
from backbones.folding import affine, foldable, parameter
from backbones.layers import Size, is_plain
from backbones.mixers.attention import Attention
from backbones.mixers.norm import normalise
from backbones.ops.linear_layer import fast_linears
from backbones.ops.windows import sliding_position_index


class SlidingAttention(Attention):
    """Multi-head self-attention of each position to the window centred at it (Table 5).

    The parameters are window attention's, so Swin's weights load as they are; there is no shift and
    no padding. Positions outside of the map are left out of the softmax. Of the bias table's 13x13
    offsets, a centred 7x7 window reads the middle 7x7; the others keep what they are given.

    Args:
        dim: C, a multiple of ``num_heads``.
        num_heads: number of heads.
        window_size: side, or rows and columns, of a window, odd.
        position_bias: whether logits have a relative position bias (section 2.3).

    Raises:
        ValueError: ``window_size`` is even.
    """

    def __init__(
        self, dim: int, num_heads: int, window_size: int | Size = 7, position_bias: bool = True
    ):
        super().__init__(dim, num_heads, _odd(window_size), False, position_bias)

    def position_index(self) -> Tensor:
        """``(1, N)``: the row of the bias table for each position of the centre's window."""
        return sliding_position_index(self.window_size)[None]

    def bias_of(self, qkv: Tensor) -> Tensor:
        """``(heads, N)`` relative position bias, zeros without a table."""
        if self.relative_position_bias_table is not None:
            return self.bias()[:, 0]
        return qkv.new_zeros(self.num_heads, self.window_size[0] * self.window_size[1])

    @fast_linears
    def forward(self, x: Tensor) -> Tensor:
        """``(B, H, W, C)`` to ``(B, H, W, C)``, any H and W."""
        qkv = self.qkv(x)
        return self.proj(self.attend(qkv, self.bias_of(qkv)))

    def attend(self, qkv: Tensor, bias: Tensor) -> Tensor:
        """``(B, H, W, 3*C)`` and ``(heads, N)`` to ``(B, H, W, C)``."""
        return ops.sliding_attention(qkv, bias, self.num_heads, self.window_size)

    def set_input_size(self, feat_size: Size | None, window_size: int | Size | None = None) -> None:
        """Interpolate the bias table for another window (Table 14); ``feat_size`` has no effect.

        Raises:
            ValueError: ``window_size`` is even.
        """
        super().set_input_size(feat_size, None if window_size is None else _odd(window_size))


class StaticDynamicAttention(SlidingAttention):
    """Sliding attention whose logits have a learned part for each offset (equation 24).

    ``q_i (k_{i+d} + theta_d)``, q the scaled query. With ``theta`` 0 it is sliding attention.

    Attributes:
        theta: ``(heads, N, C/heads)``, initially normal, truncated, of standard deviation 0.02.
    """

    marks = (*SlidingAttention.marks, "theta")
    names = {}

    def __init__(
        self, dim: int, num_heads: int, window_size: int | Size = 7, position_bias: bool = True
    ):
        super().__init__(dim, num_heads, window_size, position_bias)
        positions = self.window_size[0] * self.window_size[1]
        self.theta = nn.Parameter(torch.empty(num_heads, positions, dim // num_heads))
        trunc_normal_(self.theta, std=0.02)

    def attend(self, qkv: Tensor, bias: Tensor) -> Tensor:
        """``(B, H, W, 3*C)`` and ``(heads, N)`` to ``(B, H, W, C)``."""
        return ops.convolutional_attention(
            qkv, bias, self.num_heads, self.window_size, theta=self.theta
        )

    def adapt(self, entries: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Take Swin's weights, with ``theta`` 0: sliding attention."""
        return _with_entry(entries, "theta", torch.zeros(self.theta.shape))

    def fit(self, name: str, value: Tensor) -> Tensor:
        """Interpolate the bias table and ``theta`` of another square window."""
        if name != "theta":
            return super().fit(name, value)
        side = round(value.shape[1] ** 0.5) if value.ndim == 3 else 0
        if value.shape[::2] != self.theta.shape[::2] or side**2 != value.shape[1]:
            return value
        return _of_window(value, (side, side), self.window_size)

    def set_input_size(self, feat_size: Size | None, window_size: int | Size | None = None) -> None:
        """Interpolate the bias table and ``theta`` for another window, bicubic."""
        before = self.window_size
        super().set_input_size(feat_size, window_size)
        if self.window_size != before:
            theta = _of_window(self.theta.detach(), before, self.window_size)
            self.theta = parameter(theta, self.theta)


class PostConvolutionalAttention(SlidingAttention):
    """Sliding attention whose logits are convolved over the window's offsets (equation 25).

    The convolution is 3x3, circular in the window, before position bias and softmax; products with
    positions outside of the map count as 0.

    Attributes:
        post: ``(heads, 3, 3)``, initially 1 at the centre: sliding attention.
    """

    marks = (*SlidingAttention.marks, "post")
    names = {}

    def __init__(
        self, dim: int, num_heads: int, window_size: int | Size = 7, position_bias: bool = True
    ):
        super().__init__(dim, num_heads, window_size, position_bias)
        self.post = nn.Parameter(_deltas(num_heads))

    def adapt(self, entries: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Take Swin's weights, with the initial ``post``: sliding attention."""
        return _with_entry(entries, "post", _deltas(self.num_heads))

    def attend(self, qkv: Tensor, bias: Tensor) -> Tensor:
        """``(B, H, W, 3*C)`` and ``(heads, N)`` to ``(B, H, W, C)``."""
        return ops.convolutional_attention(
            qkv, bias, self.num_heads, self.window_size, kernel=self.post
        )


class PreConvolutionalAttention(SlidingAttention):
    """Sliding attention on ``ReLU(BN(conv3x3(x)))`` (equations 26 and 27).

    Query, key and value all read the convolved map; the convolution has zero padding and no bias.

    Args:
        dim: C, a multiple of ``num_heads``.
        num_heads: number of heads.
        window_size: side, or rows and columns, of a window, odd.
        position_bias: whether logits have a relative position bias.
        kind: ``"shared"``, one kernel for all channels; ``"depthwise"``, one for each;
            ``"full"``, a normal convolution (equation 27).
    """

    marks = (*SlidingAttention.marks, "pre.conv.weight")
    names = {}

    def __init__(
        self,
        dim: int,
        num_heads: int,
        window_size: int | Size = 7,
        position_bias: bool = True,
        kind: str = "shared",
    ):
        super().__init__(dim, num_heads, window_size, position_bias)
        self.pre = PreConvolution(dim, kind)

    def forward(self, x: Tensor) -> Tensor:
        """``(B, H, W, C)`` to ``(B, H, W, C)``, any H and W."""
        return super().forward(self.pre(x))

    def fold(self) -> None:
        """Fold the batch norm into the convolution."""
        self.pre.fold()


class PreConvolution(nn.Module):
    """``ReLU(BN(conv3x3(x)))`` on a channels-last map.

    Args:
        dim: C.
        kind: see :class:`PreConvolutionalAttention`.
    """

    def __init__(self, dim: int, kind: str):
        super().__init__()
        channels, groups = {"shared": (1, 1), "depthwise": (dim, dim), "full": (dim, 1)}[kind]
        self.conv = nn.Conv2d(channels, channels, 3, padding=1, groups=groups, bias=False)
        self.norm = nn.BatchNorm2d(dim)

    def forward(self, x: Tensor) -> Tensor:
        """``(B, H, W, C)`` to ``(B, H, W, C)``."""
        return F.relu(normalise(self.norm, self.convolve(x)))

    def convolve(self, x: Tensor) -> Tensor:
        """``(B, H, W, C)`` to ``(B, H, W, C)``."""
        conv, channels = self.conv, x.shape[-1]
        if conv.in_channels == conv.groups and is_plain(conv, nn.Conv2d):
            # One kernel for all channels is a kernel for each: as fast, and no copy of the map.
            return ops.depthwise_conv(x, conv.weight.expand(channels, -1, -1, -1), conv.bias)
        x = x.permute(0, 3, 1, 2)
        if conv.in_channels == 1:
            images = conv(x.flatten(0, 1)[:, None])
            return images.unflatten(0, (-1, channels))[:, :, 0].permute(0, 2, 3, 1)
        return conv(x).permute(0, 2, 3, 1)

    def fold(self) -> None:
        """Fold the batch norm into the convolution, which then has a kernel for each channel."""
        conv, norm = self.conv, self.norm
        if not (foldable(norm) and is_plain(conv, nn.Conv2d)):
            return
        scale, shift = affine(norm)
        full = conv.groups == 1 and conv.in_channels > 1
        folded = nn.Conv2d(
            len(scale), len(scale), 3, padding=1, groups=1 if full else len(scale), device="meta"
        )
        folded.weight = parameter(conv.weight * scale[:, None, None, None], conv.weight)
        folded.bias = parameter(shift, conv.weight)
        self.conv, self.norm = folded.eval(), nn.Identity().eval()


CONVOLUTIONS = {
    "static": StaticDynamicAttention,
    "post": PostConvolutionalAttention,
    "pre": partial(PreConvolutionalAttention, kind="shared"),
    "pre_depthwise": partial(PreConvolutionalAttention, kind="depthwise"),
    "pre_full": partial(PreConvolutionalAttention, kind="full"),
}
"""The convolutional attention of appendix C by a model's ``conv``."""
FORMS = (StaticDynamicAttention, PostConvolutionalAttention, PreConvolutionalAttention)
"""Forms of Swin with parameters of their own; see :class:`.base.Mixer`."""


def _odd(window_size: int | Size) -> Size:
    """Rows and columns of a window that has a centre; raises ValueError for another."""
    rows, columns = to_2tuple(window_size)
    if rows % 2 == 0 or columns % 2 == 0:
        raise ValueError(
            f"window_size={window_size}: sliding attention centres its window at a position, which "
            "needs odd sides"
        )
    return rows, columns


def _deltas(num_heads: int) -> Tensor:
    """``(heads, 3, 3)``: 1 at the centre."""
    return torch.eye(9)[4].reshape(3, 3).repeat(num_heads, 1, 1)


def _with_entry(entries: Mapping[str, Tensor], name: str, value: Tensor) -> dict[str, Tensor]:
    """The entries of a checkpoint; those of Swin's attention get another one."""
    return ({name: value} if "qkv.weight" in entries else {}) | dict(entries)


def _of_window(theta: Tensor, before: Size, after: Size) -> Tensor:
    """Bicubic resizing of ``(heads, N, D)`` to another window."""
    if before == after:
        return theta
    planes = theta.mT.unflatten(-1, before).float()
    resized = F.interpolate(planes, after, mode="bicubic", align_corners=False)
    return resized.flatten(2).mT.to(theta.dtype)
