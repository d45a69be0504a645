"""Depth-wise convolution with learned kernels and with kernels predicted per image."""

import torch
import torch.nn.functional as F
from torch import Tensor


def same_padding(kernel_size: int) -> tuple[int, int]:
    """Zeros before and after an axis that keep its length; an even kernel leans to the right."""
    return (kernel_size - 1) // 2, kernel_size // 2


def depthwise_conv(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Depth-wise convolution with zero padding and stride 1.

    Args:
        x: ``(B, H, W, C)``.
        weight: ``(C, 1, K, K)``, one kernel a channel, shared by all positions.
        bias: ``(C,)`` or None.

    Returns:
        ``(B, H, W, C)``.
    """
    channels, _, height, width = weight.shape
    x = x.permute(0, 3, 1, 2)
    if height % 2 and width % 2:
        out = F.conv2d(x, weight, bias, padding=(height // 2, width // 2), groups=channels)
    else:
        x = F.pad(x, (*same_padding(width), *same_padding(height)))
        out = F.conv2d(x, weight, bias, groups=channels)
    return out.permute(0, 2, 3, 1)


def dynamic_depthwise_conv(x: Tensor, kernels: Tensor, bias: Tensor | None = None) -> Tensor:
    """Depth-wise convolution whose kernels differ from image to image (D-DW-Conv).

    Args:
        x: ``(B, H, W, C)``.
        kernels: ``(B, C, K, K)``, one kernel an image and channel, shared by all positions.
        bias: ``(C,)`` or None.

    Returns:
        ``(B, H, W, C)``.
    """
    batch, height, width, channels = x.shape
    size = kernels.shape[-1]
    # One convolution of B*C groups: an image's channels are groups of their own.
    x = F.pad(x.permute(0, 3, 1, 2), (*same_padding(size), *same_padding(size)))
    x = x.reshape(1, batch * channels, *x.shape[-2:])
    weight = kernels.reshape(batch * channels, 1, size, size).to(x.dtype)
    out = F.conv2d(x, weight, groups=batch * channels)
    out = out.reshape(batch, channels, height, width).permute(0, 2, 3, 1)
    return out if bias is None else out + bias.to(out.dtype)


def autocast_dtype(x: Tensor) -> torch.dtype:
    """The dtype that autocast wants for ``x`` on its device; that of ``x`` where it is off."""
    if torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(x.device.type)
    return x.dtype
