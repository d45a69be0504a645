"""What the operators share: padding, autocast, and the dtype and layout that sums are kept in."""

import torch
import torch.nn.functional as F
from torch import Tensor


def same_padding(kernel_size: int) -> tuple[int, int]:
    """Zeros before and after an axis that keep its length; an even kernel leans to the right."""
    return (kernel_size - 1) // 2, kernel_size // 2


def autocast_dtype(x: Tensor) -> torch.dtype:
    """The dtype that autocast wants for ``x`` on its device; that of ``x`` where it is off."""
    if torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(x.device.type)
    return x.dtype


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


def register_vmap(operator: torch.library.CustomOpDef) -> None:
    """Let ``torch.vmap`` call an operator once for each entry of the mapped axis."""

    def each(info, in_dims, *args):
        outs = []
        for i in range(info.batch_size):
            picked = (
                a if d is None else a.select(d, i) for a, d in zip(args, in_dims, strict=True)
            )
            outs.append(operator(*picked))
        if isinstance(outs[0], Tensor):
            return torch.stack(outs), 0
        return tuple(map(torch.stack, zip(*outs, strict=True))), (0,) * len(outs[0])

    operator.register_vmap(each)
