"""The pyramid as a backbone for dense prediction; both adapters are this and a few lines."""

import logging
from collections.abc import Sequence
from functools import cache
from weakref import WeakKeyDictionary

import timm
import torch
from timm.layers import freeze_batch_norm_2d
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

import backbones
from backbones.layouts import layout_of, to_ours
from backbones.mixers.norm import normalise
from backbones.released import source_of

_logger = logging.getLogger(__name__)
# What stands for a backbone's stages in evaluation: no part of it, so neither saved nor moved.
_FOLDED: WeakKeyDictionary["DenseBackbone", nn.ModuleList] = WeakKeyDictionary()
NORMS = ("BN", "SyncBN", "FrozenBN")


class DenseBackbone(nn.Module):
    """A pyramid that hands out normalised feature maps of chosen stages.

    Its state dict has a classifier's names (``patch_embed``, ``stages``) and ``norms``, so that
    pretraining, detection and segmentation checkpoints initialise it alike.

    Args:
        name: one of ``backbones.MODEL_NAMES``.
        out_indices: stages to return, 0 to 3, ascending; later stages are not built.
        init: what :meth:`init_weights` reads: a ``.pth`` or ``.safetensors`` file, a URL, or a tag
            of released weights. None starts from random weights.
        drop_path_rate: stochastic depth of the last block, growing linearly over all blocks.
        frozen_stages: the patch embedding and the first so many stages neither learn nor update
            statistics; -1 freezes nothing, 0 the embedding.
        norm: ``"BN"``, ``"SyncBN"`` or ``"FrozenBN"`` for all batch norms; SyncBN becomes BN where
            there is no CUDA. The norms of the outputs are LayerNorm for Swin and Swin-Local-MLP.
        grad_checkpointing: recompute blocks in the backward pass to save memory.
        window_size: another window, or kernel of the convolutional families; None keeps 7.
        fuse: in evaluation, without gradients, run a copy made by :func:`backbones.fuse`; names and
            values of the state dict do not change. The copy is made at the first image after
            ``eval()``, ``load_state_dict()`` or ``to()``, and does not see weights that are changed
            in place between two of them; the default runs the network itself.
        **model_kwargs: anything else of the model, ``shared=True`` of Swin-Local-MLP for one.

    Raises:
        ValueError: an unknown name, norm, index or stage; the message lists the valid ones.
    """

    def __init__(
        self,
        name: str,
        *,
        out_indices: Sequence[int] = (0, 1, 2, 3),
        init: str | None = None,
        drop_path_rate: float = 0.0,
        frozen_stages: int = -1,
        norm: str = "SyncBN",
        grad_checkpointing: bool = False,
        window_size: int | None = None,
        fuse: bool = False,
        **model_kwargs,
    ):
        super().__init__()
        self.name = _checked_name(name)
        self.out_indices = _checked_indices(out_indices)
        if frozen_stages not in range(-1, 5):
            raise ValueError(f"frozen_stages={frozen_stages!r}: -1 (none) to 4 (all) are valid")
        if norm not in NORMS:
            raise ValueError(f"norm={norm!r}: {', '.join(NORMS)} are valid")
        self.init = init
        self.frozen_stages = frozen_stages
        self.fuse = fuse
        self._drop_folded()

        if window_size is not None:
            model_kwargs["window_size"] = window_size
        pyramid = timm.create_model(
            name, num_classes=0, drop_path_rate=drop_path_rate, **model_kwargs
        )
        pyramid.set_grad_checkpointing(grad_checkpointing)
        self.patch_embed = pyramid.patch_embed
        self.stages = pyramid.stages[: self.out_indices[-1] + 1]
        infos = [pyramid.feature_info[i] for i in self.out_indices]
        self.channels = tuple(info["num_chs"] for info in infos)
        self.strides = tuple(info["reduction"] for info in infos)
        # The paper's downstream models: batch norm for the convolutional families.
        norm_layer = pyramid.stages[0].blocks[0].mixer.norm_layer
        self.norms = nn.ModuleDict(
            {str(i): norm_layer(c) for i, c in zip(self.out_indices, self.channels, strict=True)}
        )
        _set_batch_norms(self, norm)
        # A whole detector's or segmentor's file may have the backbone by its authors' names.
        self.register_load_state_dict_pre_hook(_take_other_names)
        self.train()

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """``(B, 3, H, W)`` to one ``(B, C, ceil(H/stride), ceil(W/stride))`` a chosen stage."""
        x = self.patch_embed(x)
        outputs = []
        for i, stage in enumerate(self._folded_stages()):
            x = stage(x)
            if i in self.out_indices:
                norm = self.norms[str(i)]
                outputs.append(normalise(norm, x).permute(0, 3, 1, 2))
        return tuple(outputs)

    group_matcher = backbones.Pyramid.group_matcher
    no_weight_decay = backbones.Pyramid.no_weight_decay

    def init_weights(self) -> None:
        """Load ``init`` if there is one and report what fitted.

        Raises:
            backbones.CheckpointError: it does not exist, is unsafe to read, or does not fit.
        """
        if self.init is not None:
            backbones.load_checkpoint(self, source_of(self.name, self.init))

    def train(self, mode: bool = True) -> "DenseBackbone":
        """As ever, but frozen stages stay in evaluation mode and get no gradients."""
        super().train(mode)
        self._drop_folded()
        if self.frozen_stages >= 0:
            for module in (self.patch_embed, *self.stages[: self.frozen_stages]):
                module.eval().requires_grad_(False)
        return self

    def _folded_stages(self) -> nn.ModuleList:
        """The stages to run: folded ones where that is asked for and nothing is to be learned."""
        if (
            not self.fuse
            or self.training
            or torch.is_grad_enabled()
            or torch.compiler.is_compiling()
            or any(module.training for module in self.stages.modules())
        ):
            return self.stages
        if self not in _FOLDED:
            _FOLDED[self] = backbones.fuse(self.stages)
        return _FOLDED[self]

    def _drop_folded(self) -> None:
        _FOLDED.pop(self, None)

    def _apply(self, fn, recurse: bool = True) -> "DenseBackbone":
        self._drop_folded()
        return super()._apply(fn, recurse)


def revert_sync_batchnorm(model: nn.Module) -> nn.Module:
    """Replace every SyncBN of a whole detector or segmentor by BN where there is no CUDA.

    Args:
        model: any module; changed in place.

    Returns:
        The model, itself replaced if it is a SyncBN.
    """
    if torch.cuda.is_available():
        return model
    if any(isinstance(m, nn.SyncBatchNorm) for m in model.modules()):
        _say_stepping_back()
        model = _map_batch_norms(model, nn.BatchNorm2d)
    return model


def _checked_name(name: str) -> str:
    if name not in backbones.MODEL_NAMES:
        raise ValueError(f"no backbone {name!r}: {', '.join(backbones.MODEL_NAMES)} are valid")
    return name


def _checked_indices(out_indices: Sequence[int]) -> tuple[int, ...]:
    indices = tuple(out_indices)
    if not indices or list(indices) != sorted(set(indices)) or not set(indices) <= set(range(4)):
        raise ValueError(
            f"out_indices={out_indices!r}: one or more of 0, 1, 2, 3 (strides 4, 8, 16, 32), "
            "ascending, are valid"
        )
    return indices


def _take_other_names(module: DenseBackbone, state_dict: dict, prefix: str, *_) -> None:
    module._drop_folded()
    own = {k.removeprefix(prefix): v for k, v in state_dict.items() if k.startswith(prefix)}
    if layout_of(own).name == "ours":
        return
    for name in own:
        del state_dict[prefix + name]
    state_dict.update({prefix + name: value for name, value in to_ours(own).items()})


def _set_batch_norms(model: nn.Module, norm: str) -> None:
    if norm == "FrozenBN":
        freeze_batch_norm_2d(model)
    elif norm == "SyncBN":
        _map_batch_norms(model, nn.SyncBatchNorm)
        revert_sync_batchnorm(model)


@cache
def _say_stepping_back() -> None:
    _logger.warning("no CUDA here: SyncBN steps back to BN, statistics are per process")


def _map_batch_norms(model: nn.Module, cls: type[_BatchNorm]) -> nn.Module:
    """Replace BN by SyncBN or back, with the same parameters, statistics and options."""
    if isinstance(model, nn.BatchNorm2d | nn.SyncBatchNorm) and not isinstance(model, cls):
        options = (model.eps, model.momentum, model.affine, model.track_running_stats)
        other = cls(model.num_features, *options)
        other._parameters, other._buffers = model._parameters, model._buffers
        return other.train(model.training)
    for name, child in model.named_children():
        setattr(model, name, _map_batch_norms(child, cls))
    return model
