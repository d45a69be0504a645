"""Batch norm on channels-last maps."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


def batch_norm(norm: nn.Module, x: Tensor) -> Tensor:
    """Apply a ``(B, C, H, W)`` norm (BN, SyncBN, a frozen one) to a ``(B, H, W, C)`` map.

    The views keep the module an ordinary ``nn.BatchNorm2d``, so that everybody's converters to
    SyncBN and to frozen BN find and understand it.
    """
    return norm(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


def normalise(norm: nn.Module, x: Tensor) -> Tensor:
    """Apply a layer norm or a batch norm, whichever it is, to a ``(B, H, W, C)`` map."""
    return norm(x) if isinstance(norm, nn.LayerNorm | nn.Identity) else batch_norm(norm, x)


def pooled_batch_norm(norm: nn.Module, x: Tensor) -> Tensor:
    """:func:`batch_norm` for one value a channel and image, ``(B, C)``.

    A single image leaves one value a channel: its variance is undefined and PyTorch raises. The
    running statistics normalise it then, and are not updated; gradients flow as usual.
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
    """Whether the statistics come from this process only."""
    if not isinstance(norm, nn.SyncBatchNorm) or not dist.is_initialized():
        return True
    return dist.get_world_size(norm.process_group) == 1


@contextmanager
def paused_statistics(module: nn.Module) -> Iterator[None]:
    """Let the batch norms of ``module`` normalise as ever but leave their running statistics.

    Gradient checkpointing runs a block a second time in the backward pass; without this the
    running statistics would move twice.
    """
    norms = [m for m in module.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
    kept = [(norm, norm.momentum, norm.num_batches_tracked) for norm in norms]
    for norm in norms:
        # Not track_running_stats: the same tensors must be saved as in the first run.
        norm.momentum, norm.num_batches_tracked = 0.0, None
    try:
        yield
    finally:
        for norm, momentum, count in kept:
            norm.momentum, norm.num_batches_tracked = momentum, count
