"""Swin-Local-MLP: Swin's windows with learned weights instead of attention."""

import torch
from timm.layers import to_2tuple
from torch import Tensor, nn

from backbones import ops
from backbones.folding import parameter
from backbones.layers import Size, ceil_div
from backbones.mixers.base import heads_of
from backbones.mixers.windowed import WindowedMixer
from backbones.ops.common import leaf
from backbones.ops.windows import resize_window_grid


class LocalMLP(WindowedMixer):
    """Swin-Local-MLP: Swin's windows with learned weights instead of attention (appendix E).

    There is no query, key or softmax. In Table 2's form each window of the training image has its
    own matrix per head, and another image size resizes the window grid bilinearly. In Table 4's
    shared form all windows use the same matrix per head.

    Args:
        dim: C.
        num_heads: matrices per window; C/num_heads channels share one.
        window_size: side, or rows and columns, of a window.
        shifted: whether the windows are shifted by half their size.
        feat_size: rows and columns of the map at the training image size.
        shared: use Table 4's form, in which all windows use the same matrices.
    """

    marks = ("value.weight",)

    def __init__(
        self,
        dim: int,
        num_heads: int,
        window_size: int | Size = 7,
        shifted: bool = False,
        feat_size: Size = (56, 56),
        shared: bool = False,
    ):
        super().__init__(dim, num_heads, window_size, shifted)
        positions = self.window_size[0] * self.window_size[1]
        # (heads, N, N) or (nH, nW, heads, N, rows, columns): model.to(memory_format=...) would
        # reorder a parameter of rank 4 or 5.
        if shared:
            shape = (num_heads, positions, positions)
        else:
            shape = (*self._grid(*feat_size), num_heads, positions, *self.window_size)
        self.shared = shared
        self.weight = nn.Parameter(torch.empty(shape))
        # nn.Linear's default bound for N inputs.
        nn.init.uniform_(self.weight, -(positions**-0.5), positions**-0.5)
        self.value = nn.Linear(dim, dim)
        self.proj = nn.Linear(dim, dim)

    @classmethod
    def at(
        cls,
        dim: int,
        stage: int,
        block: int,
        feat_size: Size,
        *,
        num_heads: tuple[int, ...] = (3, 6, 12, 24),
        window_size: int | Size = 7,
        shared: bool = False,
    ):
        """Build the mixer of one block; every second block of a stage is shifted.

        The positional arguments are those of :meth:`.base.Mixer.at`.

        Args:
            num_heads: heads of each stage; as many as channels give each its own matrix (Table 4).
            window_size: side, or rows and columns, of a window, in positions.
            shared: one matrix per head for all windows (Table 4, 24.3M parameters in tiny) instead
                of one per head and window (Table 2, 26.15M).
        """
        shifted = block % 2 == 1
        return cls(dim, heads_of(num_heads, stage), window_size, shifted, feat_size, shared)

    def mix(self, x: Tensor, shift: Size) -> Tensor:
        """``(B, H, W, C)`` to ``(B, H, W, C)``, H and W multiples of the window."""
        weight = self.weight
        if not self.shared:
            weight = _of_windows(weight, x, self.window_size)
        x = ops.local_mlp(self.value(x), weight, self.bias(), self.window_size, shift)
        return self.proj(x)

    def fit(self, name: str, value: Tensor) -> Tensor:
        """Resize the window grid; convert between the per-window and the shared form."""
        if name != "weight":
            return super().fit(name, value)
        weight, per_window = self.weight, value.ndim == 6
        if self.shared:
            return value.mean((0, 1)).flatten(-2) if per_window else value
        if per_window and value.shape[2:] == weight.shape[2:]:
            return resize_window_grid(value, tuple(weight.shape[:2]))
        if value.ndim == 3 and value.shape[:2] == weight.shape[2:4]:
            return value.unflatten(-1, self.window_size).expand_as(weight).clone()
        return value

    def set_input_size(self, feat_size: Size | None, window_size: int | Size | None = None) -> None:
        """Resize the window grid in place for maps of ``feat_size``.

        Raises:
            ValueError: ``window_size`` differs from the current one.
        """
        if window_size is not None and self.window_size != to_2tuple(window_size):
            raise ValueError(
                f"Swin-Local-MLP's window cannot change from {self.window_size} to {window_size}: "
                "its weights belong to pairs of positions; build it with window_size"
            )
        if not self.shared and feat_size is not None:
            weight = resize_window_grid(self.weight.detach(), self._grid(*feat_size))
            self.weight = parameter(weight, self.weight)

    def _grid(self, height: int, width: int) -> Size:
        return _grid(height, width, self.window_size)


@torch.fx.wrap
@leaf
def _of_windows(weight: Tensor, x: Tensor, window_size: Size) -> Tensor:
    """``(nH, nW, heads, N, N)`` for the windows of a map ``(B, H, W, C)``."""
    return resize_window_grid(weight, _grid(*x.shape[1:3], window_size)).flatten(-2)


def _grid(height: int, width: int, window_size: Size) -> Size:
    """Rows and columns of windows."""
    rows, columns = window_size
    return ceil_div(height, rows), ceil_div(width, columns)
