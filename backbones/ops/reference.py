"""The ``reference`` backend: the operators in plain PyTorch, differentiated by autograd.

Tests compare every other backend with it. It runs under ``torch.func`` and forward-mode AD, and
window attention is exported in this form.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from backbones.ops.common import same_padding
from backbones.ops.windows import Size, partition, region_mask, reverse, roll


def aggregate(x: Tensor, kernels: Tensor) -> Tensor:
    """:func:`backbones.ops.inhomogeneous_aggregation` with all windows in memory (equation 6)."""
    size, groups = kernels.shape[-1], kernels.shape[3]
    height, width = x.shape[1:3]
    padded = F.pad(x, (0, 0, *same_padding(size), *same_padding(size)))
    windows = padded.unfold(1, size, 1).unfold(2, size, 1)[:, :height, :width]
    windows = windows.unflatten(3, (groups, -1))
    return torch.einsum("bhwgskl,bhwgkl->bhwgs", windows, kernels).flatten(-2)


inhomogeneous_aggregation = aggregate


def depthwise_conv(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """:func:`backbones.ops.depthwise_conv` as an aggregation with one kernel for all positions."""
    out = aggregate(x, weight[:, 0].expand(*x.shape[:3], -1, -1, -1))
    return out if bias is None else out + bias


def dynamic_depthwise_conv(x: Tensor, kernels: Tensor, bias: Tensor | None = None) -> Tensor:
    """:func:`backbones.ops.dynamic_depthwise_conv` as an aggregation with one kernel per image."""
    out = aggregate(x, kernels[:, None, None].expand(-1, *x.shape[1:3], -1, -1, -1))
    return out if bias is None else out + bias


def inhomogeneous_dynamic_depthwise_conv(
    x: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor, kernel_size: int
) -> Tensor:
    """:func:`backbones.ops.inhomogeneous_dynamic_depthwise_conv` with all kernels in memory."""
    kernels = F.linear(hidden, weight, bias).unflatten(-1, (-1, kernel_size, kernel_size))
    return aggregate(x, kernels)


def window_attention(
    qkv: Tensor, bias: Tensor, num_heads: int, window_size: Size, shift: Size
) -> Tensor:
    """:func:`backbones.ops.window_attention` with all scores and masks in memory."""
    height, width = qkv.shape[1:3]
    channels = qkv.shape[-1] // 3
    qkv = roll(qkv, (-shift[0], -shift[1]))
    windows = partition(qkv, window_size, 3 * num_heads).unflatten(3, (3, num_heads))
    query, key, value = windows.unbind(3)
    query = query * (channels // num_heads) ** -0.5
    scores = query @ key.transpose(-2, -1) + bias.to(query.dtype)
    same = region_mask(height, width, window_size, shift, qkv.device)
    scores = scores.masked_fill(~same[:, :, None], float("-inf"))
    out = reverse(scores.softmax(dim=-1) @ value, window_size)
    return roll(out, shift)


def sliding_attention(qkv: Tensor, bias: Tensor, num_heads: int, window_size: Size) -> Tensor:
    """:func:`backbones.ops.sliding_attention` with the keys and values of all windows in memory."""
    return convolutional_attention(qkv, bias.to(qkv.dtype), num_heads, window_size)


def convolutional_attention(
    qkv: Tensor,
    bias: Tensor,
    num_heads: int,
    window_size: Size,
    theta: Tensor | None = None,
    kernel: Tensor | None = None,
) -> Tensor:
    """:func:`backbones.ops.convolutional_attention` with all windows in memory."""
    query, key, value = qkv.unflatten(-1, (3, num_heads, -1)).unbind(-3)
    key, value = (_centred_windows(x, window_size) for x in (key, value))
    query = query * query.shape[-1] ** -0.5
    scores = torch.einsum("bhwgd,bhwgdn->bhwgn", query, key)
    if kernel is not None:
        scores = scores.unflatten(-1, window_size)
        scores = sum(
            torch.roll(scores, (1 - y, 1 - x), (-2, -1)) * kernel[:, y, x, None, None]
            for y in range(3)
            for x in range(3)
        ).flatten(-2)
    if theta is not None:
        scores = scores + torch.einsum("bhwgd,gnd->bhwgn", query, theta)
    inside = _centred_windows(qkv.new_ones(1, *qkv.shape[1:3], 1, 1), window_size)[..., 0, :]
    weights = (scores + bias).masked_fill(inside == 0, float("-inf")).softmax(-1)
    return torch.einsum("bhwgn,bhwgdn->bhwgd", weights, value).flatten(-2)


def _centred_windows(x: Tensor, window_size: Size) -> Tensor:
    """``(B, H, W, heads, D)`` to ``(B, H, W, heads, D, N)``, zeros outside of the map."""
    up, left = (side // 2 for side in window_size)
    padded = F.pad(x, (0, 0, 0, 0, left, left, up, up))
    return padded.unfold(1, window_size[0], 1).unfold(2, window_size[1], 1).flatten(-2)


def local_mlp(
    value: Tensor, weight: Tensor, bias: Tensor | None, window_size: Size, shift: Size
) -> Tensor:
    """:func:`backbones.ops.local_mlp` with the weights of all windows in memory."""
    height, width = value.shape[1:3]
    same = region_mask(height, width, window_size, shift, value.device)
    mixing = (weight if bias is None else weight + bias) * same[:, :, None]
    value = roll(value, (-shift[0], -shift[1]))
    windows = partition(value, window_size, mixing.shape[-3])
    return roll(reverse(mixing @ windows, window_size), shift)
