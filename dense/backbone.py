"""The pyramid as a backbone for dense prediction; the framework adapters subclass it."""

import logging
from collections.abc import Sequence
from functools import cache
from weakref import WeakKeyDictionary

import timm
import torch
from torch import Tensor, nn

import backbones
from backbones.layouts import layout_of, to_ours
from backbones.mixers.norm import freeze_batch_norms, normalise
from backbones.released import source_of
from dense.waiting import waiting

_logger = logging.getLogger(__name__)
# Fused copies of stages. Kept outside the modules: state_dict() and to() must not see them.
_FOLDED: WeakKeyDictionary["DenseBackbone", nn.ModuleList] = WeakKeyDictionary()
NORMS = ("BN", "SyncBN", "FrozenBN")


class DenseBackbone(nn.Module):
    """A pyramid that returns the normalised feature maps of selected stages.

    The state dict has the classifier's keys (``patch_embed``, ``stages``) plus ``norms``; it loads
    checkpoints of classifiers, detectors and segmentors.

    >>> backbone = DenseBackbone("dw_conv_nano", out_indices=(1, 2, 3), norm="BN")
    >>> c3, c4, c5 = backbone(torch.randn(1, 3, 512, 768))  # strides 8, 16, 32

    Args:
        name: one of ``backbones.MODEL_NAMES``.
        out_indices: stages to return, 0 to 3, ascending; later stages are not built.
        init: source of :meth:`init_weights`: a ``.pth`` or ``.safetensors`` file, a URL, or a tag
            of released weights. None keeps random weights.
        drop_path_rate: drop path rate of the last block; it grows linearly from 0 over all blocks.
        frozen_stages: freezes the patch embedding and this many stages, running statistics
            included; -1 freezes nothing, 0 only the patch embedding.
        norm: ``"BN"``, ``"SyncBN"`` or ``"FrozenBN"``, the type of all batch norms. SyncBN becomes
            BN without CUDA. Swin and Swin-Local-MLP have a LayerNorm at each output instead.
        grad_checkpointing: recompute blocks in the backward pass to save memory.
        window_size: window, or kernel of the convolutional families; None keeps 7.
        fuse: in evaluation without gradients, run a copy made by :func:`backbones.fuse`; the state
            dict does not change. The first forward after ``eval()``, ``load_state_dict()`` or
            ``to()`` makes the copy; it misses in-place changes of weights made after that.
        **model_kwargs: other arguments of the model, such as Swin-Local-MLP's ``shared=True``, or
            ``output_stride=8`` or ``16``, which the strides follow.

    Raises:
        ValueError: unknown name, norm, index or stage; the message lists the valid ones.
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
        if name not in backbones.MODEL_NAMES:
            valid = ", ".join(backbones.MODEL_NAMES)
            raise ValueError(f"no backbone {name!r}: {valid} are valid")
        self.name = name
        self.out_indices = _checked_indices(out_indices)
        if frozen_stages not in range(-1, 5):
            raise ValueError(f"frozen_stages={frozen_stages!r}: -1 (none) to 4 (all) are valid")
        if norm not in NORMS:
            raise ValueError(f"norm={norm!r}: {', '.join(NORMS)} are valid")
        self.init = init
        self.frozen_stages = frozen_stages
        self.fuse = fuse

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
        # As the paper's detectors and segmentors: batch norm for the convolutional families,
        # whatever norm_layer the blocks have.
        norm_layer = type(pyramid.stages[0].blocks[0].mixer).norm_layer
        self.norms = nn.ModuleDict(
            {str(i): norm_layer(c) for i, c in zip(self.out_indices, self.channels, strict=True)}
        )
        if norm == "FrozenBN":
            freeze_batch_norms(self)
        elif norm == "SyncBN":
            revert_sync_batchnorm(nn.SyncBatchNorm.convert_sync_batchnorm(self))
        # Released detectors and segmentors have their authors' keys for the backbone.
        self.register_load_state_dict_pre_hook(_take_other_names)
        self.train()

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """``(B, 3, H, W)`` to a ``(B, C, ceil(H/stride), ceil(W/stride))`` per selected stage."""
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
        """Load ``init``, if given, log which keys matched, and keep the ``load_report``.

        Raises:
            backbones.CheckpointError: ``init`` does not exist, is unsafe to read or does not fit.
        """
        if self.init is not None:
            with waiting(f"reading the weights of {self.init}"):
                source = source_of(self.name, self.init)
                self.load_report = backbones.load_checkpoint(self, source)

    def train(self, mode: bool = True) -> "DenseBackbone":
        """As ``nn.Module.train``; frozen stages stay in evaluation mode without gradients."""
        super().train(mode)
        _FOLDED.pop(self, None)
        if self.frozen_stages >= 0:
            for module in (self.patch_embed, *self.stages[: self.frozen_stages]):
                module.eval().requires_grad_(False)
        return self

    def _folded_stages(self) -> nn.ModuleList:
        """The stages, or their fused copy where ``fuse`` is set and nothing is trained."""
        if (
            not self.fuse
            or self.training
            or torch.is_grad_enabled()
            or torch.compiler.is_compiling()
            or torch.jit.is_tracing()
            or any(module.training for module in self.stages.modules())
        ):
            return self.stages
        if self not in _FOLDED:
            _FOLDED[self] = backbones.fuse(self.stages)
        return _FOLDED[self]

    def _apply(self, fn, recurse: bool = True) -> "DenseBackbone":
        _FOLDED.pop(self, None)
        return super()._apply(fn, recurse)


def revert_sync_batchnorm(model: nn.Module) -> nn.Module:
    """Replace every SyncBN of a model by BN if there is no CUDA; with CUDA, do nothing.

    >>> model = revert_sync_batchnorm(build_model(cfg))

    Args:
        model: any module; changed in place.

    Returns:
        ``model``, or the BN in its place if ``model`` itself is a SyncBN.
    """
    if torch.cuda.is_available():
        return model
    if any(isinstance(m, nn.SyncBatchNorm) for m in model.modules()):
        _warn_of_fallback()
        model = _with_batch_norms(model)
    return model


def _checked_indices(out_indices: Sequence[int]) -> tuple[int, ...]:
    indices = tuple(out_indices)
    if not indices or list(indices) != sorted(set(indices)) or not set(indices) <= set(range(4)):
        raise ValueError(
            f"out_indices={out_indices!r}: one or more of 0, 1, 2, 3 (strides 4, 8, 16, 32), "
            "ascending, are valid"
        )
    return indices


def _take_other_names(module: DenseBackbone, state_dict: dict, prefix: str, *_) -> None:
    _FOLDED.pop(module, None)
    own = {k.removeprefix(prefix): v for k, v in state_dict.items() if k.startswith(prefix)}
    if layout_of(own).name == "ours":
        return
    for name in own:
        del state_dict[prefix + name]
    state_dict.update({prefix + name: value for name, value in to_ours(own).items()})


@cache
def _warn_of_fallback() -> None:
    _logger.warning("no CUDA: SyncBN falls back to BN, statistics are per process")


def _with_batch_norms(model: nn.Module) -> nn.Module:
    """Convert SyncBN to BN; parameters, statistics and options are kept."""
    if isinstance(model, nn.SyncBatchNorm):
        options = (model.eps, model.momentum, model.affine, model.track_running_stats)
        other = nn.BatchNorm2d(model.num_features, *options)
        other._parameters, other._buffers = model._parameters, model._buffers
        return other.train(model.training)
    for name, child in model.named_children():
        setattr(model, name, _with_batch_norms(child))
    return model
