"""Progress display of pretraining."""

import resource
import sys
import time

import torch
from mmengine.dist import is_main_process
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from mmengine.runner import Runner
from tqdm import tqdm


@HOOKS.register_module()
class ProgressBar(Hook):
    """Progress bar with remaining time, loss, images per second and memory.

    It also logs ``train/images_per_second`` (of all processes) and, on a CPU, where MMEngine logs
    no memory, ``train/memory_mb`` (the peak of this process).
    """

    priority = "BELOW_NORMAL"

    def before_train(self, runner: Runner) -> None:
        """Open the bar at the current iteration."""
        self._images = runner.world_size * runner.train_dataloader.batch_size
        self._at = time.perf_counter()
        self._bar = tqdm(
            total=runner.max_iters,
            initial=runner.iter,
            unit="it",
            desc=runner.experiment_name,
            disable=not is_main_process() or not sys.stderr.isatty(),
            dynamic_ncols=True,
        )

    def before_train_epoch(self, runner: Runner) -> None:
        """Restart the clock, to leave out validation."""
        self._at = time.perf_counter()

    def after_train_iter(
        self,
        runner: Runner,
        batch_idx: int,
        data_batch: dict | tuple | list | None = None,
        outputs: dict | None = None,
    ) -> None:
        """Log the scalars and advance the bar."""
        now = time.perf_counter()
        speed, self._at = self._images / (now - self._at), now
        scalars = {"images_per_second": speed}
        if not torch.cuda.is_available():
            # The peak of this process, in bytes on macOS and in KB on Linux.
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            scalars["memory_mb"] = peak / (2**20 if sys.platform == "darwin" else 2**10)
        for name, value in scalars.items():
            runner.message_hub.update_scalar(f"train/{name}", value)
        if not self._bar.disable:
            loss = float(outputs["loss"]) if outputs else float("nan")
            memory = scalars.get("memory_mb") or torch.cuda.max_memory_allocated() / 2**20
            self._bar.set_postfix_str(
                f"loss {loss:.3f}, {speed:.0f} images/s, {memory:.0f} MB", refresh=False
            )
        self._bar.update()

    def after_train(self, runner: Runner) -> None:
        """Close the bar."""
        self._bar.close()
