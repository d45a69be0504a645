"""Hooks of Detectron2's trainer: metrics before checkpoints, signals, validations cut off."""

from collections import defaultdict
from pathlib import Path

import torch
import torch.distributed as dist
from detectron2.engine import HookBase
from detectron2.engine.hooks import BestCheckpointer, EvalHook
from detectron2.utils import comm
from detectron2.utils.events import (
    CommonMetricPrinter,
    EventWriter,
    JSONWriter,
    TensorboardXWriter,
    get_event_storage,
)

from dense import files
from dense.detection.checkpoint import BEST, WholeCheckpointer
from dense.metrics import evaluated, since_best
from dense.runs import Stop, Stopped

METRICS = "metrics.json"
MONITOR = "bbox/AP"


def run_writers(folder: str, max_iter: int) -> list[EventWriter]:
    """Detectron2's default writers; ``metrics.json`` may be written twice in an iteration."""
    return [
        _Printer(max_iter),
        _Metrics(str(Path(folder, METRICS))),
        TensorboardXWriter(folder),
    ]


class _Printer(CommonMetricPrinter):
    """Detectron2's CommonMetricPrinter, once an iteration.

    A training that is stopped is written twice, and the time in between is no time of iterations.
    """

    _last = -1

    def write(self) -> None:
        """Print progress, unless that of the iteration is printed."""
        iteration = get_event_storage().iter
        if iteration != self._last:
            self._last = iteration
            super().write()


class _Metrics(JSONWriter):
    """Detectron2's JSONWriter that writes what is new of an iteration that it has written.

    Detectron2's skips the results of an evaluation after a line of the same iteration.
    """

    def __init__(self, json_file: str):
        super().__init__(json_file)
        self._written: dict[str, int] = {}

    def write(self) -> None:
        """Append a line for each iteration that has new values."""
        lines: dict[int, dict[str, float]] = defaultdict(dict)
        latest = get_event_storage().latest_with_smoothing_hint(self._window_size)
        for name, (value, iteration) in latest.items():
            if iteration > self._written.get(name, -1):
                lines[iteration][name] = value
                self._written[name] = iteration
        for iteration in sorted(lines):
            self._file_handle.write(files.json_line({**lines[iteration], "iteration": iteration}))
        self._file_handle.flush()


class WriteMetrics(HookBase):
    """Write ``metrics.json`` every ``period`` iterations, before the hooks that follow.

    Args:
        writers: from :func:`run_writers`.
        period: iterations.
    """

    def __init__(self, writers: list[EventWriter], period: int):
        self._writers = [writer for writer in writers if isinstance(writer, JSONWriter)]
        self._period = period

    def after_step(self) -> None:
        """Write if it is time."""
        if (self.trainer.iter + 1) % self._period == 0:
            for writer in self._writers:
                writer.write()


class StopOnSignal(HookBase):
    """On Ctrl-C or SIGTERM, write a checkpoint at the end of the iteration and stop.

    Raises:
        Stopped: in every process.
    """

    def __init__(self, checkpointer: WholeCheckpointer):
        self._checkpointer = checkpointer

    def before_train(self) -> None:
        """Begin to listen."""
        self._stop = Stop()

    def after_step(self) -> None:
        """Stop if a signal has come to any process."""
        asked = self._stop.asked
        if comm.get_world_size() > 1:
            device = next(self._checkpointer.model.parameters()).device
            number = torch.tensor(asked, device=device)
            dist.all_reduce(number, dist.ReduceOp.MAX)
            asked = int(number)
        if not asked:
            return
        done = self.trainer.iter
        name = f"model_{done:07d}"
        if comm.is_main_process():
            self._checkpointer.save(name, iteration=done)
        raise Stopped(asked, str(Path(self._checkpointer.save_dir, f"{name}.pth")))


class KeepBest(BestCheckpointer):
    """Write ``model_best.pth`` after an evaluation with a higher box AP than all before it.

    A resumed run compares with the evaluations before it too.

    Args:
        period: of the evaluations.
        checkpointer: writes the file; its folder has ``metrics.json``.
    """

    def __init__(self, period: int, checkpointer: WholeCheckpointer):
        super().__init__(period, checkpointer, MONITOR, file_prefix=BEST)

    def before_train(self) -> None:
        """Read the evaluations of the run that is resumed."""
        folder, first = self._checkpointer.save_dir, self.trainer.start_iter
        if first and Path(folder, f"{BEST}.pth").is_file():
            for value in evaluated(folder, MONITOR, first - 1):
                if self.best_metric is None or value > self.best_metric:
                    self._update_best(value, first - 1)


class StoppedEarly(BaseException):
    """:class:`EarlyStop` ended a training; the message says why."""


class EarlyStop(HookBase):
    """Stop when the box AP has not risen in the last ``patience`` evaluations.

    A resumed run counts those before.

    Args:
        patience: number of evaluations.
        period: of the evaluations.
        folder: of ``metrics.json``.

    Raises:
        StoppedEarly: in every process, before training or after an iteration.
    """

    def __init__(self, patience: int, period: int, folder: str):
        self._patience, self._period, self._folder = patience, period, folder
        self._values: list[float] = []

    def before_train(self) -> None:
        """Read the evaluations of the run that is resumed."""
        first = self.trainer.start_iter
        if first:
            self._values = evaluated(self._folder, MONITOR, first - 1)
            # Of ValidateOnResume, not in the file yet.
            found = self.trainer.storage.latest().get(MONITOR)
            self._values += [found[0]] if found else []
            self._stop_if_enough(first - 1)

    def after_step(self) -> None:
        """Stop after an evaluation if none of the last rose."""
        done = self.trainer.iter + 1
        if done % self._period == 0 and done != self.trainer.max_iter:
            found = self.trainer.storage.latest().get(MONITOR)
            self._values += [found[0]] if found else []
            self._stop_if_enough(self.trainer.iter)

    def _stop_if_enough(self, iteration: int) -> None:
        # The main process alone has results.
        waited = comm.all_gather(since_best(self._values))[0]
        if waited >= self._patience:
            # What a checkpoint counts.
            self.trainer.iter = iteration
            raise StoppedEarly(
                f"{MONITOR} has not risen in {waited} evaluations: the training ends after "
                f"iteration {iteration}"
            )


class ValidateOnResume(HookBase):
    """Evaluate at the start of a resumed run if a kill cut that evaluation off.

    Args:
        evaluation: the hook that evaluates.
        folder: of ``metrics.json``.
        best: the hook that keeps the best checkpoint, in the main process.
    """

    def __init__(self, evaluation: EvalHook, folder: str, best: KeepBest | None = None):
        self._evaluation, self._folder, self._best = evaluation, folder, best

    def before_train(self) -> None:
        """Evaluate if one was due and ``metrics.json`` has no results of it."""
        first, period = self.trainer.start_iter, self._evaluation._period
        if first > 0 and period > 0 and first % period == 0:
            self.validate(first - 1)

    def validate(self, iteration: int) -> bool:
        """Evaluate if ``metrics.json`` has no results of that iteration; return whether it did."""
        storage, first = self.trainer.storage, self.trainer.start_iter
        missing = comm.all_gather(not self._is_logged(iteration))[0]
        if missing:
            storage.iter = iteration
            self._evaluation._do_eval()
            if self._best:
                self._best._best_checking()
            storage.iter = first
        return missing

    def _is_logged(self, iteration: int) -> bool:
        path = Path(self._folder, METRICS)
        lines = files.json_lines(path) if path.is_file() else []
        return any(
            line.get("iteration") == iteration and any(name.endswith("/AP") for name in line)
            for line in lines
        )
