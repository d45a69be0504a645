"""Stop training in all processes when a loss is NaN or infinite."""

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
    """Check the losses of one iteration; every process must call this.

    Gradients are not checked: float16's dynamic loss scaling produces infinite ones on purpose.

    Args:
        losses: scalar losses of this process by name, at least one; the names are the same in all.
        iteration: counted from 1.
        optimizer: its learning rate is part of the error message.
        advice: appended to the error message.

    Raises:
        FloatingPointError: in all processes, if a loss of any process is not finite; one line with
            the iteration, this process's losses and the largest learning rate.
    """
    tensors = [torch.as_tensor(value).detach().float() for value in losses.values()]
    device = next((value.device for value in tensors if value.is_cuda), torch.device("cpu"))
    values = torch.stack([value.to(device) for value in tensors])
    anywhere = (~values.isfinite()).any().int()
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        # NCCL reduces CUDA tensors only; with NCCL the losses are on the GPU.
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
