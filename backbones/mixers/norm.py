"""Norms on channels-last maps."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
import torch.distributed as dist
from timm.layers import freeze_batch_norm_2d
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from backbones.ops.windows import surely


class CenteredBatchNorm2d(nn.Module):
    """Centering-calibrated batch norm (Gao et al., CVPR 2021), the CC. BN of Table 12.

    The image's mean, scaled by a learned factor per channel, is added before the batch norm:
    ``norm(x + center * mean_HW(x))``. With ``center`` 0, its initial value, it is batch norm.

    The batch norm is a submodule: converters to SyncBN and frozen BN replace a subclass of
    ``nn.BatchNorm2d`` by a class of their own, without ``center``.

    Args:
        dim: C.

    Attributes:
        center: ``(C,)``.
        norm: BN, SyncBN or frozen BN.
    """

    def __init__(self, dim: int):
        super().__init__()
        self.center = nn.Parameter(torch.zeros(dim))
        self.norm = nn.BatchNorm2d(dim)

    def forward(self, x: Tensor) -> Tensor:
        """``(B, C, H, W)`` to ``(B, C, H, W)``."""
        mean = x.mean((2, 3), dtype=self.center.dtype)
        return self.norm(x + (self.center * mean)[:, :, None, None].to(x.dtype))

    def adapt(self, entries: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Take a plain batch norm's entries, with ``center`` 0; others are kept.

        Args:
            entries: of a checkpoint, by their names in this module.
        """
        if "running_var" not in entries:
            return dict(entries)
        center = torch.zeros_like(self.center, device="cpu")
        return {"center": center} | {f"norm.{name}": value for name, value in entries.items()}


NORM_LAYERS = {
    "layernorm": nn.LayerNorm,
    "batchnorm": nn.BatchNorm2d,
    "centered_batchnorm": CenteredBatchNorm2d,
}
"""The norms of Table 12 by their names as a model's ``norm_layer``; each is called with C."""


def normalise(norm: nn.Module, x: Tensor) -> Tensor:
    """Apply any norm, or an identity, to a ``(B, H, W, C)`` map.

    All but layer norm get the map permuted to ``(B, C, H, W)``, which allows plain
    ``nn.BatchNorm2d``: the frameworks' converters to SyncBN and frozen BN expect it.
    """
    if isinstance(norm, (nn.LayerNorm, nn.Identity)):
        return norm(x)
    return norm(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


def freeze_batch_norms(module: nn.Module) -> None:
    """Freeze statistics and parameters of all batch norms in a module, in place."""
    freeze_batch_norm_2d(module)
    for child in module.modules():
        if isinstance(child, CenteredBatchNorm2d):
            child.center.requires_grad_(False)


def pooled_batch_norm(norm: nn.Module, x: Tensor, copies: int = 1) -> Tensor:
    """Apply a batch norm to globally pooled maps, ``(B, C)``.

    PyTorch raises on a single value per channel in training, so one image on one device is
    normalised by the running statistics, which are not updated. So are the ``copies`` of one
    image, whose pooled values hardly differ.
    """
    x = x[:, :, None, None]
    if norm.training and surely(x.shape[0] == copies) and _alone(norm):
        norm.training = False
        try:
            out = norm(x)
        finally:
            norm.training = True
    else:
        out = norm(x)
    return out[:, :, 0, 0]


def _alone(norm: nn.Module) -> bool:
    """Whether the batch statistics come from this process only."""
    if not isinstance(norm, nn.SyncBatchNorm) or not dist.is_initialized():
        return True
    return dist.get_world_size(norm.process_group) == 1


@contextmanager
def paused_statistics(module: nn.Module) -> Iterator[None]:
    """Keep batch norms from updating their running statistics, in training mode too.

    Gradient checkpointing runs a block again in the backward pass, which would update them twice.
    """
    norms = [m for m in module.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
    kept = [(norm, norm.momentum, norm.num_batches_tracked) for norm in norms]
    for norm in norms:
        # track_running_stats stays: both runs of a checkpointed block must save the same tensors.
        norm.momentum, norm.num_batches_tracked = 0.0, None
    try:
        yield
    finally:
        for norm, momentum, count in kept:
            norm.momentum, norm.num_batches_tracked = momentum, count
