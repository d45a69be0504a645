"""A loss that is NaN or infinite stops a training in all of its processes."""

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer


def stop_if_not_finite(
    losses: Mapping[str, Tensor | float], iteration: int, optimizer: Optimizer, advice: str
) -> None:
    """Look at the losses of one iteration, in every process.

    Only losses count: an infinite gradient is what float16's dynamic scaling works with.

    Args:
        losses: scalars by name, as this process has them, the same names in all; at least one.
        iteration: its number, from 1.
        optimizer: it has the learning rates.
        advice: what may help.

    Raises:
        FloatingPointError: in every process, whichever of them saw it; one line with the iteration,
            this process's losses and the learning rate.
    """
    tensors = [torch.as_tensor(value).detach().float() for value in losses.values()]
    device = next((value.device for value in tensors if value.is_cuda), torch.device("cpu"))
    values = torch.stack([value.to(device) for value in tensors])
    anywhere = (~values.isfinite()).any().int()
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        # NCCL reduces on the GPU alone, where the losses then are.
        dist.all_reduce(anywhere, dist.ReduceOp.MAX)
    if not anywhere:
        return
    named = dict(zip(losses, values.tolist(), strict=True))
    bad = {name: value for name, value in named.items() if not math.isfinite(value)}
    rate = max(group["lr"] for group in optimizer.param_groups)
    raise FloatingPointError(
        f"iteration {iteration}: {_listed(bad) or 'a loss of another process'} is not finite "
        f"({_listed(named)}; learning rate {rate:.4g}); {advice}"
    )


def _listed(losses: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={value:.4g}" for name, value in losses.items())
