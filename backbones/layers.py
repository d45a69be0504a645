"""Sizes, small layers, and what may be read of a layer instead of calling it."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Size = tuple[int, int]

_HOOKS = ("forward_hooks", "forward_pre_hooks", "backward_hooks", "backward_pre_hooks")


class Mlp(nn.Module):
    """Linear, GELU, linear, by the names of timm's ``Mlp``.

    Args:
        dim: C.
        hidden: channels between the two.
    """

    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        """``(..., C)`` to ``(..., C)``."""
        return self.fc2(self.act(self.fc1(x)))


def is_plain(layer: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether ``layer`` may be computed from its weights without being called.

    True for an instance of exactly ``kind`` with ordinary parameters, of which nobody would notice
    that it was not called: no hook, global ones included, no replaced ``forward``, no
    parametrization, no tensor subclass (a quantised or distributed weight) as a parameter.
    """
    if type(layer) is not kind or "forward" in vars(layer):
        return False
    if any(getattr(layer, f"_{hooks}") for hooks in _HOOKS):
        return False
    if any(getattr(torch.nn.modules.module, f"_global_{hooks}") for hooks in _HOOKS):
        return False
    return all(p is None or type(p) is nn.Parameter for p in layer._parameters.values())


def ceil_div(length: int, step: int) -> int:
    """``ceil(length / step)``, in the form whose nesting a compiler's symbolic sizes simplify."""
    return (length - 1) // step + 1


def crop(x: Tensor, height: int, width: int) -> Tensor:
    """The first ``height`` rows and ``width`` columns of ``(B, H, W, C)``."""
    if not torch.compiler.is_compiling():
        return x[:, :height, :width]
    # A slice asks whether it is contiguous, by which a graph would be split.
    return F.pad(x, (0, 0, 0, width - x.shape[2], 0, height - x.shape[1]))
