"""What the operators compute, in the plainest PyTorch: the truth that every path is held to.

Slow, memory-hungry and differentiable by autograd alone; nothing but tests and benchmarks calls
these.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from backbones.ops.depthwise import same_padding


def aggregate(x: Tensor, kernels: Tensor) -> Tensor:
    """Apply a kernel of its own at every position (equation 6 with the weights of 8).

    Args:
        x: ``(B, H, W, C)``.
        kernels: ``(B, H, W, G, K, K)``; channel ``c`` uses group ``c // (C/G)``.

    Returns:
        ``(B, H, W, C)``.
    """
    size, groups = kernels.shape[-1], kernels.shape[3]
    height, width = x.shape[1:3]
    padded = F.pad(x, (0, 0, *same_padding(size), *same_padding(size)))
    windows = padded.unfold(1, size, 1).unfold(2, size, 1)[:, :height, :width]
    windows = windows.unflatten(3, (groups, -1))
    return torch.einsum("bhwgskl,bhwgkl->bhwgs", windows, kernels).flatten(-2)


def depthwise_conv(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """:func:`backbones.ops.depthwise_conv` as an aggregation with one kernel everywhere."""
    out = aggregate(x, weight[:, 0].expand(*x.shape[:3], -1, -1, -1))
    return out if bias is None else out + bias


def dynamic_depthwise_conv(x: Tensor, kernels: Tensor, bias: Tensor | None = None) -> Tensor:
    """:func:`backbones.ops.dynamic_depthwise_conv` as an aggregation, one kernel an image."""
    out = aggregate(x, kernels[:, None, None].expand(-1, *x.shape[1:3], -1, -1, -1))
    return out if bias is None else out + bias


def inhomogeneous_dynamic_depthwise_conv(
    x: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor, kernel_size: int
) -> Tensor:
    """:func:`backbones.ops.inhomogeneous_dynamic_depthwise_conv` with all kernels in memory."""
    kernels = F.linear(hidden, weight, bias).unflatten(-1, (-1, kernel_size, kernel_size))
    return aggregate(x, kernels)
