"""Attention and learned static mixing inside shifted windows (Swin, Swin-Local-MLP)."""

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from backbones.ops import reference, window_native
from backbones.ops.dispatch import choose, exporting

Size = tuple[int, int]


def window_attention(
    qkv: Tensor, bias: Tensor, num_heads: int, window_size: Size, shift: Size
) -> Tensor:
    """Multi-head attention inside (shifted) windows.

    ``softmax(q k^T / sqrt(C / heads) + bias) v`` in every window; after a shift, pairs of
    positions that were not neighbours before it do not see each other.

    Args:
        qkv: ``(B, H, W, 3*C)``, query, key and value side by side, each of them head-major; H and
            W are multiples of the window.
        bias: ``(heads, N, N)`` relative position bias, N the positions of a window.
        num_heads: the heads that share the channels.
        window_size: rows and columns of a window.
        shift: rows and columns of the cyclic shift; 0 along an axis that one window covers.

    Returns:
        ``(B, H, W, C)``.
    """
    path = choose("window_attention", qkv)
    if path == "native" or (path == "triton" and window_native.fits(window_size)):
        return window_native.window_attention(qkv, bias, num_heads, window_size, shift)
    if path == "reference" or exporting():
        return reference.window_attention(qkv, bias, num_heads, window_size, shift)
    scale = (qkv.shape[-1] // (3 * num_heads)) ** -0.5
    # (3, B, nH, nW, heads, N, C/heads)
    query, key, value = (
        partition(_roll(qkv, shift, -1), window_size, 3 * num_heads)
        .unflatten(3, (3, num_heads))
        .unbind(3)
    )
    bias = bias.to(query.dtype)
    if not _shifts(shift) and qkv.device.type == "cpu" and not torch.is_grad_enabled():
        # Faster than the explicit form forward, slower backward.
        windows = (part.flatten(0, 2) for part in (query, key, value))
        out = F.scaled_dot_product_attention(*windows, attn_mask=bias[None], scale=scale)
        out = out.unflatten(0, query.shape[:3])
    else:
        with torch.autocast(qkv.device.type, enabled=False):
            masks = _seam_masks(window_size, shift, bias)
            out = _Attend.apply(query * scale, key, value, bias, *masks)
    return _roll(reverse(out, window_size), shift, 1)


class _Attend(torch.autograd.Function):
    """``softmax(query key^T + bias, the other side of the seam left out) value``.

    The scores are made once and changed in place; only the windows on the seam meet a mask.
    """

    @staticmethod
    def forward(ctx, query, key, value, bias, rows: Tensor | None, columns: Tensor | None):
        weights = query @ key.transpose(-2, -1)
        weights += bias
        # Every row keeps its diagonal, so -inf is safe; the usual -100 costs denormals.
        if rows is not None:
            weights[:, -1:] += rows
        if columns is not None:
            weights[:, :, -1:] += columns
        weights = weights.softmax(-1)
        out = weights @ value
        ctx.save_for_backward(query, key, value, weights, out)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        query, key, value, weights, out = ctx.saved_tensors
        grad_value = weights.transpose(-2, -1) @ grad
        grad_scores = grad @ value.transpose(-2, -1)
        grad_scores -= (grad * out).sum(-1, keepdim=True)
        grad_scores *= weights
        grad_query, grad_key = grad_scores @ key, grad_scores.transpose(-2, -1) @ query
        return grad_query, grad_key, grad_value, grad_scores.sum((0, 1, 2)), None, None


def _seam_masks(
    window_size: Size, shift: Size, like: Tensor
) -> tuple[Tensor | None, Tensor | None]:
    """Two ``(N, N)``, for the last windows of each axis: 0, and -inf across the seam there.

    None for an axis that is not shifted.
    """
    # Cached by shape, a few numbers each; a graph being captured must make its own.
    make = _make_seam_masks if torch.compiler.is_compiling() else _cached_seam_masks
    return make(window_size, shift, like.device, like.dtype)


def _make_seam_masks(
    window_size: Size, shift: Size, device: torch.device, dtype: torch.dtype
) -> tuple[Tensor | None, Tensor | None]:
    masks = []
    for axis in range(2):
        along = (shift[0], 0) if axis == 0 else (0, shift[1])
        if not _shifts(along):
            masks.append(None)
            continue
        same = region_mask(*window_size, window_size, along, device)[0, 0]
        masks.append(torch.zeros_like(same, dtype=dtype).masked_fill(~same, float("-inf")))
    return masks[0], masks[1]


_cached_seam_masks = lru_cache(maxsize=64)(_make_seam_masks)


def local_mlp(
    value: Tensor, weight: Tensor, bias: Tensor, window_size: Size, shift: Size
) -> Tensor:
    """Learned static mixing inside (shifted) windows: ``out = (weight + bias) v``.

    No query, no key, no softmax; pairs of positions that the shift brought together weigh zero.

    Args:
        value: ``(B, H, W, C)``, H and W multiples of the window.
        weight: ``(heads, N, N)`` shared by all windows, or ``(nH, nW, heads, N, N)``, one for each
            window of the image, N the positions of a window.
        bias: ``(heads, N, N)`` relative position bias.
        window_size: rows and columns of a window.
        shift: rows and columns of the cyclic shift; 0 along an axis that one window covers.

    Returns:
        ``(B, H, W, C)``.
    """
    path = choose("local_mlp", value)
    if path == "reference":
        return reference.local_mlp(value, weight, bias, window_size, shift)
    height, width = value.shape[1:3]
    mixing = weight + bias
    if path == "native" or (path == "triton" and window_native.fits(window_size)):
        return window_native.local_mlp(value, mixing, window_size, shift)
    if _shifts(shift):
        same_region = region_mask(height, width, window_size, shift, value.device)
        mixing = mixing * same_region[:, :, None]
    windows = partition(_roll(value, shift, -1), window_size, mixing.shape[-3])
    return _roll(reverse(mixing @ windows, window_size), shift, 1)


def steps(length: int, step: int) -> int:
    """``ceil(length / step)``, in the form whose nesting a compiler's symbolic sizes simplify."""
    return (length - 1) // step + 1


def crop(x: Tensor, height: int, width: int) -> Tensor:
    """The first ``height`` rows and ``width`` columns of ``(B, H, W, C)``."""
    if not torch.compiler.is_compiling():
        return x[:, :height, :width]
    # A slice asks whether it is contiguous, by which a graph would be split.
    return F.pad(x, (0, 0, 0, width - x.shape[2], 0, height - x.shape[1]))


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


def region_mask(
    height: int, width: int, window_size: Size, shift: Size, device: torch.device
) -> Tensor:
    """Which pairs of a shifted window were neighbours before the shift.

    Returns:
        ``(nH, nW, N, N)`` bool, True where both positions come from the same side of the seam.
    """
    region = (
        2 * _region(height, window_size[0], shift[0], device)[:, None]
        + _region(width, window_size[1], shift[1], device)[None]
    )
    region = partition(region[None, :, :, None], window_size, 1)[0, :, :, 0, :, 0]
    return region[:, :, :, None] == region[:, :, None, :]


def _region(length: int, window: int, shift: int, device: torch.device) -> Tensor:
    """``(length,)``: 1 for the positions that the shift wrapped around, the last ``shift`` ones."""
    # Only the last window straddles the seam, so two regions an axis tell all pairs apart.
    return (torch.arange(length, device=device) >= length - shift).long()


def _roll(x: Tensor, shift: Size, sign: int) -> Tensor:
    if not _shifts(shift):
        return x
    return torch.roll(x, (sign * shift[0], sign * shift[1]), (1, 2))


def _shifts(shift: Size) -> bool:
    """Whether there is a shift, or may be one where a compiler's symbolic sizes leave it open."""
    return not (surely(shift[0] == 0) and surely(shift[1] == 0))


def surely(condition: bool) -> bool:
    """``condition``, or False where a compiler's symbolic sizes leave it open.

    Asking them outright would split the graph by it, into one for each answer.
    """
    if not torch.compiler.is_compiling():
        return bool(condition)
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    return statically_known_true(condition)


def relative_position_bias(table: Tensor, index: Tensor) -> Tensor:
    """``(heads, N, N)`` from a ``((2h-1)*(2w-1), heads)`` table and an ``(N, N)`` index into it."""
    return table[index.flatten()].unflatten(0, index.shape).permute(2, 0, 1)


def relative_position_index(window_size: Size) -> Tensor:
    """``(N, N)``: the row of the bias table for each pair of positions of a window."""
    rows, columns = window_size
    grid = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    y, x = (axis.flatten() for axis in grid)
    return (y[:, None] - y + rows - 1) * (2 * columns - 1) + x[:, None] - x + columns - 1


def resize_window_grid(weight: Tensor, grid: Size) -> Tensor:
    """Resize the window grid of ``(nH, nW, ...)`` weights to ``grid``, bilinearly."""
    if surely(weight.shape[0] == grid[0]) and surely(weight.shape[1] == grid[1]):
        return weight
    planes = weight.flatten(2).movedim(-1, 0)[None]
    resized = F.interpolate(planes.float(), grid, mode="bilinear", align_corners=False)
    return resized[0].to(weight.dtype).movedim(0, -1).unflatten(-1, weight.shape[2:])
