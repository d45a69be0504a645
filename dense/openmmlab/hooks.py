"""Hooks of the training recipes."""

from pathlib import Path

import torch
from mmengine.dist import all_reduce, broadcast_object_list
from mmengine.hooks import EMAHook, Hook
from mmengine.registry import HOOKS
from mmengine.runner import EpochBasedTrainLoop, Runner

from dense.finite import stop_if_not_finite
from dense.metrics import evaluated, read_run, since_best
from dense.runs import Stop, Stopped

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
class StopOnSignal(Hook):
    """On Ctrl-C or SIGTERM, write ``iter_<n>.pth`` at the end of the iteration and stop.

    During a validation it stops at once if the checkpoint before it is written; resuming runs the
    validation again. A second signal stops at once.

    >>> custom_hooks = [dict(type="StopOnSignal")]

    Raises:
        Stopped: in every process.
    """

    # After CheckpointHook and the hooks that a checkpoint stores.
    priority = "LOWEST"

    def before_train(self, runner: Runner) -> None:
        """Begin to listen."""
        self._stop, self._saved = Stop(), -1

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Remember which iteration has a checkpoint."""
        self._saved = checkpoint["meta"]["iter"]

    def after_train_iter(
        self,
        runner: Runner,
        batch_idx: int,
        data_batch: dict | tuple | list | None = None,
        outputs: dict | None = None,
    ) -> None:
        """Write a checkpoint and stop, if a signal has come to any process."""
        asked = self._stop.asked
        if runner.distributed:
            asked = torch.tensor(asked)
            all_reduce(asked, "max")
            asked = int(asked)
        if asked:
            done = runner.iter + 1
            path = Path(runner.work_dir, f"iter_{done}.pth")
            meta = dict(epoch=runner.epoch, iter=done)
            runner.save_checkpoint(runner.work_dir, path.name, meta=meta, by_epoch=False)
            raise Stopped(asked, str(path))

    def after_val_iter(
        self,
        runner: Runner,
        batch_idx: int,
        data_batch: dict | tuple | list | None = None,
        outputs: list | None = None,
    ) -> None:
        """Stop if the state before the validation is in a checkpoint."""
        # Before training, and in a test, nobody listens.
        stop = getattr(self, "_stop", None)
        if stop and stop.asked and not runner.distributed and self._saved == runner.iter:
            raise Stopped(stop.asked, f"the checkpoint of iteration {runner.iter}")


@HOOKS.register_module()
class ValidateOnResume(Hook):
    """Run the validation that a kill cut off after the checkpoint from which a run resumes.

    >>> custom_hooks = [dict(type="ValidateOnResume")]
    """

    # After CheckpointHook, which prepares to keep the best checkpoint.
    priority = "LOWEST"

    def before_train(self, runner: Runner) -> None:
        """Validate if the logs have no validation of the resumed iteration, though one is due."""
        due = [runner.rank == 0 and runner.val_loop is not None and self._is_due(runner)]
        broadcast_object_list(due)
        if due[0]:
            runner.logger.info(f"the validation after iteration {runner.iter} was cut off: again")
            runner.val_loop.run()

    def _is_due(self, runner: Runner) -> bool:
        loop, by_epoch = runner.train_loop, isinstance(runner.train_loop, EpochBasedTrainLoop)
        # A checkpoint written between two epochs may count the epoch as not finished.
        done = loop.iter / len(loop.dataloader) if by_epoch else loop.iter
        if not done or done < loop.val_begin:
            return False
        loop._decide_current_val_interval()
        # Nor is one due within an epoch: a part of one is no multiple of the interval.
        if done % loop.val_interval and done != (loop.max_epochs if by_epoch else loop.max_iters):
            return False
        try:
            log = read_run(runner.work_dir)
        except ValueError:
            return True
        steps = (
            log.epochs if by_epoch else {s for points in log.metrics.values() for s, _ in points}
        )
        return done not in steps


@HOOKS.register_module()
class EarlyStop(Hook):
    """Stop when a metric has not risen in the last ``patience`` evaluations.

    A resumed run counts those before. The iteration at which it stops has a checkpoint.

    >>> custom_hooks = [dict(type="EarlyStop", monitor="mIoU", patience=5)]

    Args:
        monitor: the metric's name in the results of an evaluation; higher is better.
        patience: number of evaluations.
    """

    def __init__(self, monitor: str, patience: int):
        self._monitor, self._patience = monitor, patience
        self._values: list[float] = []

    # After EMAHook, which has the averaged weights in the model during an evaluation.
    priority = "LOW"

    def before_train(self, runner: Runner) -> None:
        """Read the evaluations of the run that is resumed."""
        values = [evaluated(runner.work_dir, self._monitor, runner.iter) if runner.iter else []]
        broadcast_object_list(values)
        self._values = values[0]
        self._stop_if_enough(runner)

    def after_val_epoch(self, runner: Runner, metrics: dict[str, float] | None = None) -> None:
        """Stop after this evaluation if none of the last rose."""
        if self._monitor not in (metrics or {}):
            raise KeyError(f"EarlyStop: the evaluation has no {self._monitor!r}: {metrics}")
        self._values.append(float(metrics[self._monitor]))
        if self._stop_if_enough(runner):
            written = (f"iter_{runner.iter}.pth", f"epoch_{runner.epoch}.pth")
            if not any(Path(runner.work_dir, name).is_file() for name in written):
                meta = dict(epoch=runner.epoch, iter=runner.iter)
                runner.save_checkpoint(runner.work_dir, written[0], meta=meta, by_epoch=False)

    def _stop_if_enough(self, runner: Runner) -> bool:
        waited = since_best(self._values)
        enough = waited >= self._patience
        if enough:
            runner.train_loop.stop_training = True
            runner.logger.info(
                f"{self._monitor} has not risen above {max(self._values):.4g} in {waited} "
                f"evaluations: the training ends at iteration {runner.iter}"
            )
        return enough


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
