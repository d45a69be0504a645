"""Hooks of the training recipes."""

from mmengine.hooks import EMAHook, Hook
from mmengine.registry import HOOKS
from mmengine.runner import Runner

from dense.finite import stop_if_not_finite

_ADVICE = "a lower learning rate, or AMP in bfloat16 (optim_wrapper.dtype=bfloat16), may help"


@HOOKS.register_module()
class StopOnNonFiniteLoss(Hook):
    """Stop every process when a loss is NaN or infinite in any of them.

    >>> custom_hooks = [dict(type="StopOnNonFiniteLoss")]

    Raises:
        FloatingPointError: in every process; the message has the iteration and the losses.
    """

    # Must run before CheckpointHook writes the damaged weights.
    priority = "VERY_HIGH"

    def after_train_iter(
        self,
        runner: Runner,
        batch_idx: int,
        data_batch: dict | tuple | list | None = None,
        outputs: dict | None = None,
    ) -> None:
        """Check the losses of one iteration."""
        losses = {name: value for name, value in (outputs or {}).items() if "loss" in name}
        if losses:
            optimizer = runner.optim_wrapper.optimizer
            stop_if_not_finite(losses, runner.iter + 1, optimizer, _ADVICE)


@HOOKS.register_module()
class AveragedWeights(EMAHook):
    """MMEngine's EMAHook; checkpoints also record which state dict is the average.

    ``meta["weights"]`` describes both: ``state_dict`` holds the averaged weights, and
    ``ema_state_dict``, despite its name, the trained ones.
    """

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Swap the two state dicts as MMEngine does, and describe them in ``meta``."""
        super().before_save_checkpoint(runner, checkpoint)
        checkpoint["meta"]["weights"] = {
            "state_dict": f"averaged, decay {1 - self.ema_cfg['momentum']:g}",
            "ema_state_dict": "as trained",
        }
