"""Norms on channels-last maps."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


def batch_norm(norm: nn.Module, x: Tensor) -> Tensor:
    """Apply BN, SyncBN or frozen BN to a ``(B, H, W, C)`` map.

    Permuting the map allows a plain ``nn.BatchNorm2d``, which the frameworks' converters to SyncBN
    and frozen BN expect.
    """
    return norm(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


def normalise(norm: nn.Module, x: Tensor) -> Tensor:
    """Apply a layer norm, batch norm or identity to a ``(B, H, W, C)`` map."""
    return norm(x) if isinstance(norm, nn.LayerNorm | nn.Identity) else batch_norm(norm, x)


def pooled_batch_norm(norm: nn.Module, x: Tensor) -> Tensor:
    """Apply a batch norm to globally pooled maps, ``(B, C)``.

    PyTorch raises on a single value per channel in training, so one image on one device is
    normalised by the running statistics, which are not updated.
    """
    x = x[:, :, None, None]
    if norm.training and x.shape[0] == 1 and _alone(norm):
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
