"""The second half of a block of the models that ``backbones.fuse`` returns, by C on CPUs."""

from dataclasses import dataclass
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor

from backbones.ops import native
from backbones.ops.dispatch import choose

# Columns of a panel, as the C source has it.
_WIDTH = 64


@dataclass(frozen=True)
class Panels:
    """The weights of :func:`residual_mlp`, in the layout of the C kernels.

    Attributes:
        projection: weight and bias of the linear before; None for both if there is none.
        first, second: weight and bias of the MLP's linears.
        hidden: channels of the MLP's hidden map.
        epsilon: the layer norm's, ``(1,)``; None if there is no norm.
    """

    projection: tuple[Tensor | None, Tensor | None]
    first: tuple[Tensor, Tensor]
    second: tuple[Tensor, Tensor]
    hidden: int
    epsilon: Tensor | None

    @classmethod
    @torch.no_grad()
    def of(
        cls,
        dtype: torch.dtype,
        linears: tuple[tuple[Tensor, Tensor | None], ...],
        norm: tuple[Tensor | None, Tensor | None, float] | None = None,
    ) -> Self:
        """For maps of ``dtype``.

        Args:
            linears: weight ``(D, C)`` and bias of each: the two of the MLP, before them the
                projection if there is one.
            norm: weight and bias of the layer norm, which become part of the linear after it, and
                its epsilon; None for no norm.
        """
        *before, (first, bias), second = linears
        sums = native.sums(dtype)
        epsilon = None
        if norm is not None:
            scale, shift, eps = norm
            epsilon = first.new_tensor([eps], dtype=sums)
            wide = torch.promote_types(first.dtype, torch.float32)
            given = first.to(wide)
            if shift is not None:
                moved = given @ shift.to(wide)
                bias = moved if bias is None else bias.to(wide) + moved
            first = given if scale is None else given * scale.to(wide)
        return cls(
            _panels(dtype, *before[0]) if before else (None, None),
            _panels(dtype, first, bias),
            _panels(dtype, *second),
            len(first),
            epsilon,
        )


def by_native(x: Tensor) -> bool:
    """Whether C computes the second half of blocks: on a CPU, without gradients or graphs."""
    if choose("residual_mlp", x, x) != "native" or torch.is_grad_enabled():
        return False
    return x.numel() > 0 and native.reads(x.dtype)


def residual_mlp(x: Tensor, mixed: Tensor | None, panels: Panels, out: Tensor) -> None:
    """``y + MLP(norm(y))`` into ``out``, where y is ``x + linear(relu(mixed))``, or x.

    The MLP is linear, GELU (the exact one), linear. :func:`by_native` must be true of x.

    Args:
        x: ``(..., C)``, contiguous as the others.
        mixed: like x, where the panels have a projection; otherwise None.
        panels: the weights.
        out: like x; it may be x or ``mixed``.

    Raises:
        ValueError: a tensor is not contiguous, or has another dtype than x.
        MemoryError: there is none for the work space.
    """
    channels = x.shape[-1]
    weights = *panels.projection, *panels.first, *panels.second, panels.epsilon
    sizes = x.numel() // channels, channels, panels.hidden
    native.call("residual_mlp", (x, x if mixed is None else mixed, out), weights, sizes)


def _panels(dtype: torch.dtype, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """Weight and bias as the C source describes them, in the dtype of sums."""
    sums, pair = native.sums(dtype), native.factor(dtype)
    rows, terms = weight.shape
    missing = -rows % _WIDTH
    bias = weight.new_zeros(rows) if bias is None else bias
    weight = F.pad(weight, (0, -terms % pair, 0, missing)).to(dtype if pair > 1 else sums)
    panels = weight.view(-1, _WIDTH, weight.shape[1] // pair, pair).transpose(1, 2).contiguous()
    return panels.view(sums), F.pad(bias.to(sums), (0, missing))
