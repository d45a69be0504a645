"""Linear layers and MLPs as everybody knows them, their products by the operators' paths."""

from torch import Tensor, nn

from backbones import ops


class Linear(nn.Linear):
    """``torch.nn.Linear`` by :func:`backbones.ops.linear`."""

    def forward(self, input: Tensor) -> Tensor:
        """``(..., C)`` to ``(..., D)``."""
        return ops.linear(input, self.weight, self.bias)


class Mlp(nn.Module):
    """Linear, GELU, linear, by the names of timm's ``Mlp``.

    Args:
        dim: C.
        hidden: channels between the two.
    """

    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.fc1 = Linear(dim, hidden)
        self.act = nn.GELU()
        self.fc2 = Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        """``(..., C)`` to ``(..., C)``."""
        fc1, fc2 = self.fc1, self.fc2
        if _is_plain(fc1, Linear) and _is_plain(self.act, nn.GELU) and _is_plain(fc2, Linear):
            return ops.mlp(x, fc1.weight, fc1.bias, fc2.weight, fc2.bias)
        return fc2(self.act(fc1(x)))


def _is_plain(layer: nn.Module, kind: type) -> bool:
    """Whether nobody has replaced it or hooked something to it that wants to be called."""
    hooks = (layer._forward_hooks, layer._forward_pre_hooks, layer._backward_hooks)
    return type(layer) is kind and not any(hooks)
