"""Small layers and helpers that the pyramid, the mixers and the fusion share."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backbones.ops.common import leaf, without_autocast
from backbones.ops.linear_layer import fast_linears

Size = tuple[int, int]

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_GLOBAL_HOOKS = tuple(f"_global{hooks}" for hooks in _HOOKS)


class Mlp(nn.Module):
    """Linear, GELU, linear, with the parameter names of timm's ``Mlp``.

    Args:
        dim: input and output channels C.
        hidden: channels between the linears.
    """

    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(hidden, dim)

    @fast_linears
    def forward(self, x: Tensor) -> Tensor:
        """``(..., C)`` to ``(..., C)``."""
        return self.fc2(self.act(self.fc1(x)))


class SqueezeExcite(nn.Module):
    """Squeeze-and-excitation (Hu et al., 2018): the map times a gate per image and channel.

    ``sigmoid(fc2(relu(fc1(mean_HW(x)))))``, with PyTorch's initialisation of the linears. The gate
    is computed without autocast: means differ little between images.

    Args:
        dim: C.
        ratio: hidden channels divided by C.

    Raises:
        ValueError: ``ratio`` leaves no hidden channel, or is above 1.
    """

    # Linears that backbones.fuse leaves alone: they have a row per image.
    read_by_operator = ("fc1", "fc2")

    def __init__(self, dim: int, ratio: float = 1 / 16):
        super().__init__()
        if not 0 < ratio <= 1 or int(dim * ratio) < 1:
            raise ValueError(f"se_ratio={ratio}: {dim} channels need {1 / dim} to 1, or 0 for none")
        hidden = int(dim * ratio)
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        """``(B, H, W, C)`` to ``(B, H, W, C)``."""
        with without_autocast(self.fc1.weight):
            mean = x.mean((1, 2), dtype=self.fc1.weight.dtype)
            gate = self.fc2(F.relu(self.fc1(mean))).sigmoid()
        return x * gate[:, None, None].to(x.dtype)


def is_plain(layer: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether an operator may read the weights of ``layer`` instead of calling it.

    True for exactly ``kind``, without hooks (global ones included), a patched ``forward``, a
    parametrization, or parameters of a tensor subclass (quantised or sharded weights).
    """
    own = vars(layer)
    if type(layer) is not kind or "forward" in own or any(map(own.__getitem__, _HOOKS)):
        return False
    if any(map(vars(torch.nn.modules.module).__getitem__, _GLOBAL_HOOKS)):
        return False
    return all(p is None or type(p) is nn.Parameter for p in layer._parameters.values())


def ceil_div(length: int, step: int) -> int:
    """``ceil(length / step)`` for positive ints; torch.compile can simplify nested calls."""
    return (length - 1) // step + 1


@leaf
def crop(x: Tensor, height: int, width: int) -> Tensor:
    """Crop ``(B, H, W, C)`` to the first ``height`` rows and ``width`` columns."""
    if not torch.compiler.is_compiling():
        return x[:, :height, :width]
    # A slice checks whether it is contiguous, which would guard the graph on the size.
    return F.pad(x, (0, 0, 0, width - x.shape[2], 0, height - x.shape[1]))
