"""What the operators share: padding, autocast, and the dtype and layout that sums are kept in."""

from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor


def same_padding(kernel_size: int) -> tuple[int, int]:
    """Zeros before and after an axis that keep its length; an even kernel leans to the right."""
    return (kernel_size - 1) // 2, kernel_size // 2


def autocast_dtype(x: Tensor) -> torch.dtype:
    """The dtype that autocast wants for ``x`` on its device; that of ``x`` where it is off."""
    kind = x.device.type
    # The meta device has no autocast to ask for.
    if x.is_meta or not torch.is_autocast_enabled(kind) or x.dtype == torch.float64:
        return x.dtype
    return torch.get_autocast_dtype(kind)


def without_autocast(x: Tensor) -> AbstractContextManager:
    """A context in which operators on tensors beside ``x`` keep the dtypes they are given."""
    return nullcontext() if x.is_meta else torch.autocast(x.device.type, enabled=False)


def summed(first: Tensor, *others: Tensor) -> Tensor | list[Tensor]:
    """Contiguous tensors in the dtype that sums over ``first`` are kept in: float32 at least.

    Returns:
        One tensor for one, a list for several.
    """
    dtype = torch.promote_types(first.dtype, torch.float32)
    tensors = [x.to(dtype).contiguous() for x in (first, *others)]
    return tensors if others else tensors[0]


def pad(x: Tensor, size: int) -> Tensor:
    """``(B, H, W, S, G)`` with the zeros around it that a kernel of ``size`` reads."""
    return F.pad(x, (0, 0, 0, 0, *same_padding(size), *same_padding(size)))


def inside(padded: Tensor, shape: torch.Size, size: int) -> Tensor:
    """What :func:`pad` was given, of ``shape``, out of the padded map."""
    first = same_padding(size)[0]
    return padded[:, first : first + shape[1], first : first + shape[2]].contiguous()
