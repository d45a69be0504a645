"""Batch norms folded into the layers beside them, for inference."""

from copy import deepcopy
from typing import TypeVar

import torch
from torch import Tensor, nn

from backbones.layers import Linear
from backbones.mixers import (
    DepthwiseConv,
    DynamicDepthwiseConv,
    InhomogeneousDynamicDepthwiseConv,
)
from backbones.mixers.dw_conv import ConvMixer
from backbones.pyramid import Block

Model = TypeVar("Model", bound=nn.Module)


def fuse(model: Model, inplace: bool = False) -> Model:
    """Fold the batch norms of every block into the linears and convolutions beside them.

    The outputs are those of evaluation mode, to rounding; the layer-norm families have nothing to
    fold. The norm after I-D-DW-Conv's operator stays: its kernels are shared by several channels,
    which a norm scales each by its own factor. So do the norms of the outputs. The linears' weights
    are laid out by columns, as products on a CPU read them.

    Args:
        model: a pyramid, a dense backbone, or a whole model with one in it, with any kind of batch
            norm.
        inplace: change ``model`` instead of a copy of it.

    Returns:
        The model in evaluation mode, without the folded norms: it cannot be trained, and its state
        dict is not a checkpoint of the unfolded one.
    """
    model = (model if inplace else deepcopy(model)).eval()
    with torch.no_grad():
        for block in model.modules():
            if isinstance(block, Block) and isinstance(block.mixer, ConvMixer):
                _fold_mixer(block.mixer)
                if _foldable(block.norm2):
                    block.mlp.fc1 = _linear_after(block.norm2, block.mlp.fc1)
                    block.norm2 = nn.Identity().eval()
        for name, layer in model.named_modules():
            # What predicts kernels has few rows to multiply, or is read by its operator.
            if type(layer) is Linear and not name.endswith("expand"):
                layer.weight = _by_columns(layer.weight)
    return model


def _by_columns(weight: Tensor) -> nn.Parameter:
    """The same in the order that a product of rows reads it in."""
    return nn.Parameter(weight.t().contiguous().t(), requires_grad=weight.requires_grad)


def _foldable(norm: nn.Module) -> bool:
    """Whether it is a norm, not one folded before, with statistics to fold."""
    return getattr(norm, "running_var", None) is not None


def _fold_mixer(mixer: ConvMixer) -> None:
    for linear, norm in (
        ("in_proj", "in_norm"),
        ("out_proj", "out_norm"),
        ("reduce", "reduce_norm"),
    ):
        if _foldable(getattr(mixer, norm, None)):
            folded = _linear_before(getattr(mixer, linear), getattr(mixer, norm))
            setattr(mixer, linear, folded)
            setattr(mixer, norm, nn.Identity().eval())
    if not _foldable(mixer.mid_norm) or isinstance(mixer, InhomogeneousDynamicDepthwiseConv):
        return
    scale, shift = _affine(mixer.mid_norm)
    if isinstance(mixer, DepthwiseConv):
        weight = mixer.conv.weight * scale[:, None, None, None]
        mixer.conv.weight = _parameter(weight, mixer.conv.weight)
        mixer.conv.bias = _parameter(mixer.conv.bias * scale + shift, mixer.conv.bias)
        mixer.mid_norm = nn.Identity().eval()
    elif isinstance(mixer, DynamicDepthwiseConv):
        # The rows of a channel's predicted kernel take the factor of that channel.
        rows = scale.repeat_interleave(mixer.kernel_size**2)
        expand = mixer.expand
        expand.weight = _parameter(expand.weight * rows[:, None], expand.weight)
        expand.bias = _parameter(expand.bias * rows, expand.bias)
        mixer.bias = _parameter(mixer.bias * scale + shift, mixer.bias)
        mixer.mid_norm = nn.Identity().eval()


def _linear_before(linear: nn.Linear, norm: nn.Module) -> nn.Linear:
    """``norm(linear(x))`` as one linear layer."""
    scale, shift = _affine(norm)
    bias = shift if linear.bias is None else linear.bias * scale + shift
    return _linear(linear, linear.weight * scale[:, None], bias)


def _linear_after(norm: nn.Module, linear: nn.Linear) -> nn.Linear:
    """``linear(norm(x))`` as one linear layer."""
    scale, shift = _affine(norm)
    bias = linear.weight.double() @ shift
    bias = bias if linear.bias is None else bias + linear.bias
    return _linear(linear, linear.weight * scale, bias)


def _linear(like: nn.Linear, weight: Tensor, bias: Tensor) -> nn.Linear:
    folded = Linear(like.in_features, like.out_features, device="meta")
    folded.weight = _parameter(weight, like.weight)
    folded.bias = _parameter(bias, like.weight)
    return folded.eval()


def _affine(norm: nn.Module) -> tuple[Tensor, Tensor]:
    """Factor and summand of a batch norm in evaluation mode, float64."""
    scale = (norm.running_var.double() + norm.eps).rsqrt()
    shift = -norm.running_mean.double() * scale
    if norm.weight is not None:
        scale, shift = scale * norm.weight, shift * norm.weight
    return scale, shift if norm.bias is None else shift + norm.bias


def _parameter(value: Tensor, like: Tensor) -> nn.Parameter:
    return nn.Parameter(value.to(like), requires_grad=like.requires_grad)
