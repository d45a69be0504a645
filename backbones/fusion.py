"""Prepare networks for inference: fold batch norms, replace linears and MLPs by faster ones."""

from copy import deepcopy
from typing import TypeVar

import torch
from torch import nn

from backbones.folding import foldable, linear_after
from backbones.inference import InferenceBlock, InferenceLinear, InferenceMerging, InferenceMlp
from backbones.layers import Mlp, is_plain
from backbones.mixers.conv import ConvMixer
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
                fold_norms(module)
                _replace_linears(module)
                _join_activation(module.mixer)
                if type(module) is Block:
                    InferenceBlock.become(module)
            elif isinstance(module, PatchMerging):
                _replace_linears(module)
                if type(module) is PatchMerging:
                    module.__class__ = InferenceMerging
    return model


def fold_norms(block: Block) -> None:
    """Fold the batch norms of a block, in place and for evaluation only."""
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


def _join_activation(mixer: nn.Module) -> None:
    """Let the product before a mixer's first ReLU compute it."""
    if not isinstance(mixer, ConvMixer) or not is_plain(mixer.in_act, nn.ReLU):
        return
    if is_plain(mixer.in_proj, InferenceLinear) and is_plain(mixer.in_norm, nn.Identity):
        mixer.in_proj.activation = "relu"
        mixer.in_act = nn.Identity().eval()


def _is_of_plain_layers(mlp: Mlp) -> bool:
    linears = is_plain(mlp.fc1, nn.Linear) and is_plain(mlp.fc2, nn.Linear)
    return linears and is_plain(mlp.act, nn.GELU) and mlp.act.approximate == "none"
