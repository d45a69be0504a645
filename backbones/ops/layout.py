"""What the operators share: padding that keeps an axis, and the dtype that autocast wants."""

import torch
from torch import Tensor


def same_padding(kernel_size: int) -> tuple[int, int]:
    """Zeros before and after an axis that keep its length; an even kernel leans to the right."""
    return (kernel_size - 1) // 2, kernel_size // 2


def autocast_dtype(x: Tensor) -> torch.dtype:
    """The dtype that autocast wants for ``x`` on its device; that of ``x`` where it is off."""
    if torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(x.device.type)
    return x.dtype
