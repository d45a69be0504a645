"""Hooks of every training here."""

import math

import torch
from mmengine.dist import all_reduce
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from mmengine.runner import Runner


@HOOKS.register_module()
class StopOnNonFiniteLoss(Hook):
    """Stop all processes together when a loss is NaN or infinite, and say which and when.

    Raises:
        FloatingPointError: in every process, whichever of them saw it.
    """

    # Before a checkpoint of the damaged weights is written.
    priority = "VERY_HIGH"

    def after_train_iter(
        self,
        runner: Runner,
        batch_idx: int,
        data_batch: dict | tuple | list | None = None,
        outputs: dict | None = None,
    ) -> None:
        """Look at the losses of one iteration."""
        losses = {name: value for name, value in (outputs or {}).items() if "loss" in name}
        values = {name: float(torch.as_tensor(value).detach()) for name, value in losses.items()}
        bad = {name: value for name, value in values.items() if not math.isfinite(value)}
        anywhere = torch.tensor(float(bool(bad)))
        all_reduce(anywhere, "max")
        if anywhere:
            named = ", ".join(f"{name}={value}" for name, value in bad.items())
            raise FloatingPointError(
                f"iteration {runner.iter + 1}: {named or 'a loss of another process'} is not "
                "finite; a lower learning rate, or AMP in bfloat16 "
                "(optim_wrapper.dtype=bfloat16), may help"
            )
