"""The base class of the windowed mixers: padding, shift and relative position bias."""

from collections.abc import Callable
from typing import Self

import torch
import torch.nn.functional as F
from timm.layers import resize_rel_pos_bias_table, to_2tuple, trunc_normal_
from torch import Tensor, nn

from backbones.folding import parameter
from backbones.layers import Size, ceil_div, crop
from backbones.mixers.base import Mixer
from backbones.ops.common import leaf
from backbones.ops.dispatch import exporting
from backbones.ops.linear_layer import fast_linears
from backbones.ops.windows import (
    is_of_square_window,
    relative_position_bias,
    relative_position_index,
)

TABLE = "relative_position_bias_table"


class WindowedMixer(Mixer):
    """Pads the map to whole windows, mixes inside (shifted) windows, and crops the padding.

    Args:
        dim: C, a multiple of ``num_heads``.
        num_heads: number of heads.
        window_size: side, or rows and columns, of a window.
        shifted: whether the windows are shifted by half their size; an axis that a single window
            covers is never shifted.
        position_bias: whether there is a relative position bias table; without one it is None.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        window_size: int | Size,
        shifted: bool,
        position_bias: bool = True,
    ):
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"num_heads={num_heads} does not divide the {dim} channels")
        self.num_heads = num_heads
        self.shifted = shifted
        self.window_size = to_2tuple(window_size)
        rows, columns = self.window_size
        self.register_parameter(TABLE, None)
        if position_bias:
            self.relative_position_bias_table = nn.Parameter(
                torch.empty((2 * rows - 1) * (2 * columns - 1), num_heads)
            )
            trunc_normal_(self.relative_position_bias_table, std=0.02)
        self.init_non_persistent_buffers()

    @fast_linears
    def forward(self, x: Tensor) -> Tensor:
        """``(B, H, W, C)`` to ``(B, H, W, C)``, any H and W."""
        padded = _pad_to_windows(x, self.window_size)
        shift = _half_windows(padded, self.window_size) if self.shifted else (0, 0)
        return crop(self.mix(padded, shift), x.shape[1], x.shape[2])

    def mix(self, x: Tensor, shift: Size) -> Tensor:
        """Mix a map of whole windows, ``(B, H, W, C)`` to ``(B, H, W, C)``.

        ``shift`` is in rows and columns, 0 for none.
        """
        raise NotImplementedError(f"{type(self).__name__} does not implement mix()")

    def bias(self) -> Tensor:
        """``(heads, N, N)`` relative position bias."""
        return relative_position_bias(
            self.relative_position_bias_table, self.relative_position_index
        )

    def init_non_persistent_buffers(self) -> None:
        """Compute the index into the bias table (timm's hook for non-persistent buffers)."""
        table, index = self.relative_position_bias_table, None
        if table is not None:
            index = self.position_index().to(table.device)
        self.register_buffer("relative_position_index", index, persistent=False)

    def position_index(self) -> Tensor:
        """``(N, N)``: the row of the bias table for each pair of positions in a window."""
        return relative_position_index(self.window_size)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        # to_empty() allocates a meta tensor's memory without values.
        index = self.relative_position_index
        super()._apply(fn, recurse)
        if index is not None and index.is_meta and not self.relative_position_index.is_meta:
            self.init_non_persistent_buffers()
        return self

    def no_weight_decay(self) -> set[str]:
        """The bias table, as in Swin."""
        return set() if self.relative_position_bias_table is None else {TABLE}

    def fit(self, name: str, value: Tensor) -> Tensor:
        """Interpolate the bias table of another square window (Table 14)."""
        table = self.relative_position_bias_table
        if name == TABLE and value.shape[1:] == table.shape[1:] and is_of_square_window(value):
            return resize_rel_pos_bias_table(value, self.window_size, tuple(table.shape))
        return value

    def set_input_size(self, feat_size: Size | None, window_size: int | Size | None = None) -> None:
        """Interpolate the bias table for another window (Table 14); ``feat_size`` has no effect."""
        window_size = self.window_size if window_size is None else to_2tuple(window_size)
        if window_size == self.window_size:
            return
        rows, columns = window_size
        if (given := self.relative_position_bias_table) is not None:
            table = resize_rel_pos_bias_table(
                given.detach(),
                new_window_size=window_size,
                new_bias_shape=((2 * rows - 1) * (2 * columns - 1), self.num_heads),
                old_window_size=self.window_size,
            )
            self.relative_position_bias_table = parameter(table, given)
        self.window_size = window_size
        self.init_non_persistent_buffers()


@torch.fx.wrap
@leaf
def _pad_to_windows(x: Tensor, window_size: Size) -> Tensor:
    """Pad ``(B, H, W, C)`` with zeros, right and below, to whole windows."""
    height, width = x.shape[1:3]
    rows, columns = window_size
    right = columns * ceil_div(width, columns) - width
    bottom = rows * ceil_div(height, rows) - height
    return F.pad(x, (0, 0, 0, right, 0, bottom))


@torch.fx.wrap
@leaf
def _half_windows(x: Tensor, window_size: Size) -> Size:
    """The shift of ``(B, H, W, C)``: half a window, 0 for an axis that one window covers."""
    (height, width), (rows, columns) = x.shape[1:3], window_size
    if exporting():
        # By arithmetic: 1 - 1 // n is 0 for a single window. A comparison would be a guard, or in a
        # traced graph the first image's for all.
        down, across = height // rows, width // columns
        return rows // 2 * (1 - 1 // down), columns // 2 * (1 - 1 // across)
    return rows // 2 if height > rows else 0, columns // 2 if width > columns else 0


torch.fx.wrap("crop")
