"""Swin-Local-MLP: Swin's windows, the attention weights learned parameters."""

import torch
from timm.layers import to_2tuple
from torch import Tensor, nn

from backbones import ops
from backbones.layers import Size, ceil_div
from backbones.mixers.windowed import WindowedMixer
from backbones.ops.windows import resize_window_grid


class LocalMLP(WindowedMixer):
    """Swin-Local-MLP: Swin's windows with learned weights instead of attention (appendix E).

    The mixing is static: there is no query, no key and no softmax.
    Table 2's form has a weight matrix of its own for each window of the training image and each
    head; on an image of another size the grid of windows is resized bilinearly. Table 4's shared
    form has one matrix a head, used in every window.

    Args:
        feat_size: rows and columns of the map at the training size, which fix the window grid.
        shared: one matrix a head for all windows instead of one a window.
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
        # Per window (nH, nW, heads, N, rows, columns), shared (heads, N, N): neither has a rank of
        # 4 or 5, which model.to(memory_format=...) takes for images.
        if shared:
            shape = (num_heads, positions, positions)
        else:
            shape = (*self._grid(*feat_size), num_heads, positions, *self.window_size)
        self.weight = nn.Parameter(torch.empty(shape))
        # The bound of a linear layer over the positions of a window.
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
        """The mixer of one block.

        Args:
            dim: C.
            stage: the index of the stage.
            block: the index of the block in its stage; every second one is shifted.
            feat_size: rows and columns of the map at the training size.
            num_heads: weight matrices in each stage; the channels of a head share one.
                ``embed_dim`` times the stage's width gives every channel its own (Table 4).
            window_size: rows and columns of a window, in positions.
            shared: one matrix a head for all windows (Table 4, 24.3M in tiny) instead of one a
                window of the training image (Table 2, 26.15M in tiny).
        """
        shifted = block % 2 == 1
        return cls(dim, num_heads[stage], window_size, shifted, feat_size, shared)

    @property
    def shared(self) -> bool:
        """Whether all windows use the same weights."""
        return self.weight.ndim == 3

    def mix(self, x: Tensor, shift: Size) -> Tensor:
        """``(B, H, W, C)`` to ``(B, H, W, C)``, H and W multiples of the window."""
        weight = self.weight
        if not self.shared:
            weight = resize_window_grid(weight, self._grid(*x.shape[1:3])).flatten(-2)
        x = ops.local_mlp(self.value(x), weight, self.bias(), self.window_size, shift)
        return self.proj(x)

    def fit(self, name: str, value: Tensor) -> Tensor:
        """Weights of another grid of windows are resized; per-window and shared ones converted."""
        if name != "weight":
            return super().fit(name, value)
        weight, per_window = self.weight, 6
        if self.shared and value.ndim == per_window:
            return value.mean((0, 1)).flatten(-2)
        if self.shared:
            return value
        if value.ndim == per_window and value.shape[2:] == weight.shape[2:]:
            return resize_window_grid(value, tuple(weight.shape[:2]))
        if value.ndim == 3 and value.shape[:2] == weight.shape[2:4]:
            return value.unflatten(-1, self.window_size).expand_as(weight).clone()
        return value

    def set_input_size(self, feat_size: Size | None, window_size: int | Size | None = None) -> None:
        """Prepare for maps of ``feat_size``: resize the window grid, once and for good.

        Raises:
            ValueError: ``window_size`` differs; the learned weights of a window have no
                counterpart in a window of another size.
        """
        if window_size is not None and self.window_size != to_2tuple(window_size):
            raise ValueError(
                f"Swin-Local-MLP's window cannot change from {self.window_size} to {window_size}: "
                "its weights are learned for each pair of positions; build it with window_size"
            )
        if not self.shared and feat_size is not None:
            weight = resize_window_grid(self.weight.detach(), self._grid(*feat_size))
            self.weight = nn.Parameter(weight, requires_grad=self.weight.requires_grad)

    def _grid(self, height: int, width: int) -> Size:
        rows, columns = self.window_size
        return ceil_div(height, rows), ceil_div(width, columns)
