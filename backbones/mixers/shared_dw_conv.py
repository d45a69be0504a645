"""DW-Conv with kernels that channels share and, as an option, positions do not (Table 4)."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from backbones import ops
from backbones.folding import parameter
from backbones.layers import Size
from backbones.mixers.conv import ConvMixer, resized
from backbones.ops.common import leaf
from backbones.ops.windows import resize_window_grid


class SharedDepthwiseConv(ConvMixer):
    """DW-Conv with one kernel per head, shared by all positions or not (Table 4).

    All else is DW-Conv's: projections, norms, ReLU and a bias per channel. Kernels of positions
    belong to a map of the training image's size; for another size their grid is resized
    bilinearly.

    Args:
        dim: C.
        num_heads: kernels per position; C/num_heads channels share one.
        kernel_size: side of the square kernel K.
        feat_size: rows and columns of the map at the training image size.
        shared: whether all positions share the kernels.

    Attributes:
        kernels: ``(heads, K, K)`` if shared, else ``(H, W, heads, 1, K, K)``.
        bias: ``(C,)``.

    Raises:
        ValueError: ``num_heads`` does not divide C.
    """

    marks = ("kernels",)

    def __init__(
        self,
        dim: int,
        num_heads: int,
        kernel_size: int | Size = 7,
        feat_size: Size = (56, 56),
        shared: bool = True,
    ):
        super().__init__(dim, kernel_size)
        if dim % num_heads:
            raise ValueError(f"num_heads={num_heads} does not divide the {dim} channels")
        size = self.kernel_size
        # No rank of 4 or 5: model.to(memory_format=...) would take the kernels for images.
        shape = (num_heads, size, size) if shared else (*feat_size, num_heads, 1, size, size)
        self.shared, self.num_heads = shared, num_heads
        self.kernels = nn.Parameter(torch.empty(shape))
        self.bias = nn.Parameter(torch.empty(dim))
        # PyTorch's bound for a depth-wise convolution, of K*K inputs to an output.
        nn.init.uniform_(self.kernels, -1 / size, 1 / size)
        nn.init.uniform_(self.bias, -1 / size, 1 / size)

    def mix(self, x: Tensor) -> Tensor:
        """``(B, H, W, C)`` to ``(B, H, W, C)``."""
        if self.shared:
            kernels = self.kernels.repeat_interleave(x.shape[-1] // self.num_heads, 0)
            return ops.depthwise_conv(x, kernels[:, None], self.bias)
        kernels = _of_positions(self.kernels, x)
        kernels = kernels[:, :, :, 0].expand(x.shape[0], -1, -1, -1, -1, -1)
        out = ops.inhomogeneous_aggregation(x, kernels)
        return out + self.bias.to(out.dtype)

    def adapt(self, entries: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Take DW-Conv's convolution as kernels and bias."""
        ours = {"conv.weight": "kernels", "conv.bias": "bias"}
        return {ours.get(name, name): value for name, value in entries.items()}

    def fit(self, name: str, value: Tensor) -> Tensor:
        """Kernels of another form, size or grid.

        A kernel per channel becomes the mean over the channels of a head; kernels of positions
        become their mean where all share one; a shared kernel becomes that of all positions.
        """
        if name != "kernels" or value.ndim not in (3, 4, 6):
            return value
        heads = self.num_heads
        if value.ndim == 4:
            if value.shape[0] % heads:
                return value
            value = value.unflatten(0, (heads, -1)).mean(1).squeeze(1)
        if value.shape[0 if value.ndim == 3 else 2] != heads:
            return value
        if self.shared:
            value = value.mean((0, 1)).squeeze(1) if value.ndim == 6 else value
        elif value.ndim == 6:
            value = resize_window_grid(value, tuple(self.kernels.shape[:2]))
        else:
            value = value[:, None].expand(*self.kernels.shape[:2], -1, -1, -1, -1)
        return _of_size(value, self.kernel_size)

    def set_kernel_size(self, kernel_size: int) -> None:
        """Resize the kernels in place, bicubic (Table 14)."""
        self.kernels = parameter(_of_size(self.kernels.detach(), kernel_size), self.kernels)
        self.kernel_size = kernel_size

    def set_input_size(self, feat_size: Size | None, window_size: int | Size | None = None) -> None:
        """Resize the grid of the positions' kernels and the kernels, in place."""
        super().set_input_size(feat_size, window_size)
        if not self.shared and feat_size is not None:
            kernels = resize_window_grid(self.kernels.detach(), feat_size)
            self.kernels = parameter(kernels, self.kernels)


@torch.fx.wrap
@leaf
def _of_positions(kernels: Tensor, x: Tensor) -> Tensor:
    """Kernels of each position of a map ``(B, H, W, C)``, in a grid of its H and W."""
    return resize_window_grid(kernels, (x.shape[1], x.shape[2]))


def _of_size(kernels: Tensor, size: int) -> Tensor:
    """``(..., K, K)`` to ``(..., size, size)``."""
    shape = kernels.shape
    if shape[-1] == size:
        return kernels
    return resized(kernels.reshape(-1, 1, *shape[-2:]), size).reshape(*shape[:-2], size, size)
