"""Window partition and reverse, shift masks, and the relative position bias, as in Swin."""

import torch
import torch.nn.functional as F
from torch import Tensor

Size = tuple[int, int]


def partition(x: Tensor, window_size: Size, num_heads: int) -> Tensor:
    """``(B, H, W, C)`` to ``(B, nH, nW, heads, N, C/heads)``, windows row by row."""
    batch, height, width, channels = x.shape
    rows, columns = window_size
    x = x.reshape(
        batch, height // rows, rows, width // columns, columns, num_heads, channels // num_heads
    )
    return x.permute(0, 1, 3, 5, 2, 4, 6).flatten(4, 5)


def reverse(windows: Tensor, window_size: Size) -> Tensor:
    """``(B, nH, nW, heads, N, C/heads)`` back to ``(B, H, W, C)``."""
    batch, down, across, heads, _, dim = windows.shape
    rows, columns = window_size
    x = windows.unflatten(4, (rows, columns)).permute(0, 1, 4, 2, 5, 3, 6)
    return x.reshape(batch, down * rows, across * columns, heads * dim)


def roll(x: Tensor, shift: Size) -> Tensor:
    """``torch.roll`` of the rows and columns of ``(B, H, W, C)``."""
    if any(isinstance(by, (Tensor, torch.SymInt)) for by in shift):
        # Of a size that a graph leaves open: ONNX rolls by constants only.
        for axis, by in enumerate(shift, 1):
            length = x.shape[axis]
            places = torch.arange(length, device=x.device) - by
            # The remainder, which ONNX has of constants only; no shift is larger than the axis.
            places = torch.where(places < 0, places + length, places)
            x = x.index_select(axis, torch.where(places < length, places, places - length))
        return x
    return torch.roll(x, shift, (1, 2))


def region_mask(
    height: int, width: int, window_size: Size, shift: Size, device: torch.device
) -> Tensor:
    """The attention mask of shifted windows: which pairs of positions may see each other.

    Returns:
        ``(nH, nW, N, N)`` bool, False for two that the roll brought from opposite borders.
    """
    region = (
        2 * _region(height, window_size[0], shift[0], device)[:, None]
        + _region(width, window_size[1], shift[1], device)[None]
    )
    region = partition(region[None, :, :, None], window_size, 1)[0, :, :, 0, :, 0]
    return region[:, :, :, None] == region[:, :, None, :]


def _region(length: int, window: int, shift: int, device: torch.device) -> Tensor:
    """``(length,)``: 1 for the last ``shift`` positions, which the roll wrapped around."""
    # Only the last window mixes both, so two regions for each axis suffice.
    return (torch.arange(length, device=device) >= length - shift).long()


def surely(condition: bool) -> bool:
    """``condition``, or False if symbolic or traced sizes leave it open, without a guard."""
    if not torch.compiler.is_compiling():
        # torch.jit.trace has tensors as sizes, torch.fx proxies.
        return False if isinstance(condition, (Tensor, torch.fx.Proxy)) else bool(condition)
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    return statically_known_true(condition)


def relative_position_bias(table: Tensor, index: Tensor) -> Tensor:
    """``(heads, N, N)`` from a ``((2h-1)*(2w-1), heads)`` table and an ``(N, N)`` index into it."""
    return table[index.flatten()].unflatten(0, index.shape).permute(2, 0, 1)


def relative_position_index(window_size: Size) -> Tensor:
    """``(N, N)``: the row of the bias table for each pair of positions in a window."""
    rows, columns = window_size
    grid = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    y, x = (axis.flatten() for axis in grid)
    return (y[:, None] - y + rows - 1) * (2 * columns - 1) + x[:, None] - x + columns - 1


def sliding_position_index(window_size: Size) -> Tensor:
    """``(N,)``: the row of the bias table for each position of a window, seen from its centre.

    Of Swin's 13x13 rows, for offsets of up to 6, these are the middle 7x7, for offsets of up to 3.
    """
    rows, columns = window_size
    return relative_position_index(window_size)[rows * columns // 2]


def resize_window_grid(weight: Tensor, grid: Size) -> Tensor:
    """Resize the window grid of ``(nH, nW, ...)`` weights to ``grid``, bilinearly."""
    if surely(weight.shape[0] == grid[0]) and surely(weight.shape[1] == grid[1]):
        return weight
    planes = weight.flatten(2).movedim(-1, 0)[None]
    # In float32 at least: half precision would round the coordinates between windows too.
    planes = planes.to(torch.promote_types(planes.dtype, torch.float32))
    resized = F.interpolate(planes, grid, mode="bilinear", align_corners=False)
    return resized[0].to(weight.dtype).movedim(0, -1).unflatten(-1, weight.shape[2:])


def is_of_square_window(bias_table: Tensor) -> bool:
    """Whether a relative position bias table has the number of rows of a square window."""
    side = round(bias_table.shape[0] ** 0.5)
    return side**2 == bias_table.shape[0] and side % 2 == 1
