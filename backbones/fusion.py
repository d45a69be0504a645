"""Prepare networks for inference: fold batch norms, replace linears and MLPs by faster ones."""

from copy import deepcopy
from typing import TypeVar

import torch
from torch import Tensor, nn

from backbones import ops
from backbones.folding import foldable, linear_after, parameter
from backbones.layers import Mlp, is_plain
from backbones.pyramid import Block, PatchMerging

Model = TypeVar("Model", bound=nn.Module)


def fuse(model: Model, inplace: bool = False) -> Model:
    """Prepare a trained model for faster inference with the same outputs up to rounding.

    Batch norms of the blocks are folded into adjacent linears and convolutions. Linears and MLPs
    become :class:`InferenceLinear` and :class:`InferenceMlp`, which are faster on CPUs. Layers with
    hooks, parametrizations, quantised weights or another type are kept, as are the output norms.

    >>> model = backbones.fuse(timm.create_model("dw_conv_tiny", pretrained=True))

    Args:
        model: a backbone, or a detector, segmentor or other module that contains one.
        inplace: modify ``model``; the default modifies a copy.

    Returns:
        The model in evaluation mode. It cannot be trained, and its state dict has other entries
        than the original's.
    """
    model = (model if inplace else deepcopy(model)).eval()
    with torch.no_grad():
        for module in list(model.modules()):
            if isinstance(module, Block):
                _fold(module)
                _replace_linears(module)
            elif isinstance(module, PatchMerging):
                _replace_linears(module)
    return model


class InferenceLinear(nn.Module):
    """``nn.Linear`` for inference, computed by :func:`backbones.ops.linear`.

    Attributes:
        weight_t: ``(C, D)``, the transposed weight, contiguous for the matrix product.
        bias: ``(D,)`` or None.
    """

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.weight_t = parameter(linear.weight.t().contiguous(), linear.weight)
        self.bias = linear.bias

    @property
    def weight(self) -> Tensor:
        """``(D, C)``, a view of ``weight_t``."""
        return self.weight_t.t()

    def forward(self, x: Tensor) -> Tensor:
        """``(..., C)`` to ``(..., D)``."""
        return ops.linear(x, self.weight, self.bias)

    def extra_repr(self) -> str:
        """The sizes, in the format of :class:`torch.nn.Linear`."""
        rows, columns = self.weight_t.shape
        return f"in_features={rows}, out_features={columns}, bias={self.bias is not None}"


class InferenceMlp(nn.Module):
    """:class:`~backbones.layers.Mlp` for inference, computed by :func:`backbones.ops.mlp`."""

    def __init__(self, mlp: Mlp):
        super().__init__()
        self.fc1, self.fc2 = InferenceLinear(mlp.fc1), InferenceLinear(mlp.fc2)

    def forward(self, x: Tensor) -> Tensor:
        """``(..., C)`` to ``(..., C)``."""
        first, second = self.fc1, self.fc2
        return ops.mlp(x, first.weight, first.bias, second.weight, second.bias)


def _fold(block: Block) -> None:
    block.mixer.fold()
    mlp = block.mlp
    if foldable(block.norm2) and is_plain(mlp, Mlp) and is_plain(mlp.fc1, nn.Linear):
        mlp.fc1 = linear_after(block.norm2, mlp.fc1)
        block.norm2 = nn.Identity().eval()


def _replace_linears(parent: nn.Module) -> None:
    kept = getattr(parent, "read_by_operator", ())
    for name, child in parent.named_children():
        if name in kept:
            continue
        if is_plain(child, nn.Linear):
            setattr(parent, name, InferenceLinear(child).eval())
        elif is_plain(child, Mlp) and _is_of_plain_layers(child):
            setattr(parent, name, InferenceMlp(child).eval())
        else:
            _replace_linears(child)


def _is_of_plain_layers(mlp: Mlp) -> bool:
    linears = is_plain(mlp.fc1, nn.Linear) and is_plain(mlp.fc2, nn.Linear)
    return linears and is_plain(mlp.act, nn.GELU) and mlp.act.approximate == "none"
