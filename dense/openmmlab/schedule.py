"""Learning rate schedules of MMEngine's Runner."""

import math
from collections.abc import Sized
from typing import Any

from mmengine.optim import _ParamScheduler
from mmengine.registry import PARAM_SCHEDULERS
from torch.optim import Optimizer

# Arguments of MMEngine's schedules, and of ours, that are numbers of iterations or epochs; the
# schedules keep them as attributes.
TIMES = {"begin", "end", "T_max", "total_iters", "step_size", "milestones", "warmup"}


def without_empty(schedules: list[Any], loader: Sized) -> list[Any]:
    """Leave out what ends before its first iteration, which MMEngine's schedules refuse.

    The warm-up of a short training on a few photos is such a one: a small part of an epoch.

    >>> without_empty([dict(type="LinearLR", end=0.1, convert_to_iter_based=True)], range(8))
    []

    Args:
        schedules: of a config.
        loader: of the training, with the iterations of an epoch.
    """

    def is_empty(schedule: Any) -> bool:
        if not isinstance(schedule, dict) or not schedule.get("convert_to_iter_based"):
            return False
        first, last = schedule.get("begin", 0), schedule.get("end")
        return last is not None and first * len(loader) >= int(last * len(loader))

    return [schedule for schedule in schedules if not is_empty(schedule)]


@PARAM_SCHEDULERS.register_module()
class WarmupCosineLR(_ParamScheduler):
    """Linear warm-up and a cosine, with the values of timm's ``CosineLRScheduler``.

    >>> param_scheduler = [
    ...     dict(
    ...         type="WarmupCosineLR",
    ...         warmup=20,
    ...         warmup_lr=1e-6,
    ...         eta_min=1e-5,
    ...         convert_to_iter_based=True,
    ...     )
    ... ]

    MMEngine's ``CosineAnnealingLR`` starts at its maximum. Here, unless ``warmup_prefix`` is set,
    the cosine starts at step 0 and warm-up replaces its first part: step ``t`` has the rate
    ``warmup_lr + (lr - warmup_lr) * t / warmup`` during warm-up, then
    ``eta_min + (lr - eta_min) * (1 + cos(pi * t / end)) / 2``.

    Args:
        optimizer: the optimizer or its wrapper, whose learning rates are the maximum.
        warmup: number of warm-up steps: epochs with ``convert_to_iter_based``, as ``end``; then
            a part of one too.
        warmup_lr: learning rate of the first step.
        eta_min: learning rate that the cosine reaches at ``end``.
        end: number of steps; the Runner's default is the length of the training.
        warmup_prefix: True starts the cosine after warm-up, so that the rate has no jump there.
        last_step: number of the last step, if MMEngine continues without a checkpoint.
        by_epoch: whether a step is an epoch or an iteration.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        *,
        warmup: int,
        warmup_lr: float,
        eta_min: float,
        end: int,
        warmup_prefix: bool = False,
        last_step: int = -1,
        by_epoch: bool = True,
    ):
        self.warmup, self.warmup_lr, self.eta_min = warmup, warmup_lr, eta_min
        self.warmup_prefix = warmup_prefix
        super().__init__(optimizer, "lr", end=end, last_step=last_step, by_epoch=by_epoch)

    @classmethod
    def build_iter_from_epoch(
        cls, *args: Any, warmup: float, end: int, epoch_length: int, **kwargs: Any
    ) -> "WarmupCosineLR":
        """The schedule by iteration of ``epoch_length`` iterations per epoch."""
        steps = {"warmup": round(warmup * epoch_length), "end": round(end * epoch_length)}
        return cls(*args, **steps, **{**kwargs, "by_epoch": False})

    def _get_value(self) -> list[float]:
        return [self._at(self.last_step, base) for base in self.base_values]

    def _at(self, step: int, base: float) -> float:
        if step < self.warmup:
            return self.warmup_lr + (base - self.warmup_lr) * step / self.warmup
        start = self.warmup if self.warmup_prefix else 0
        angle = math.pi * (step - start) / (self.end - start)
        return self.eta_min + (base - self.eta_min) * (1 + math.cos(angle)) / 2
