"""Hooks of every training here."""

from mmengine.hooks import EMAHook, Hook
from mmengine.registry import HOOKS
from mmengine.runner import Runner

from dense.finite import stop_if_not_finite

_ADVICE = "a lower learning rate, or AMP in bfloat16 (optim_wrapper.dtype=bfloat16), may help"


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
        if losses:
            optimizer = runner.optim_wrapper.optimizer
            stop_if_not_finite(losses, runner.iter + 1, optimizer, _ADVICE)


@HOOKS.register_module()
class AveragedWeights(EMAHook):
    """MMEngine's average of the weights, in checkpoints that say which weights are which.

    ``meta["weights"]`` of a checkpoint tells ``state_dict``, the average, from ``ema_state_dict``,
    which despite its name are the weights as trained.
    """

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Swap the two, as MMEngine does, and say so."""
        super().before_save_checkpoint(runner, checkpoint)
        checkpoint["meta"]["weights"] = {
            "state_dict": f"averaged, decay {1 - self.ema_cfg['momentum']:g}",
            "ema_state_dict": "as trained",
        }
