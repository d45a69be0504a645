"""What a pretraining shows while it runs."""

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
    """A bar over all iterations with the time left, the loss, images per second and memory.

    The images per second, of all processes, go into the log and TensorBoard as
    ``images_per_second``; so does the memory in MB where MMEngine has none, on a CPU.
    """

    priority = "BELOW_NORMAL"

    def before_train(self, runner: Runner) -> None:
        """Open the bar where the run stands."""
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
        """Validation's time is not training's."""
        self._at = time.perf_counter()

    def after_train_iter(
        self,
        runner: Runner,
        batch_idx: int,
        data_batch: dict | tuple | list | None = None,
        outputs: dict | None = None,
    ) -> None:
        """Move on by one."""
        now = time.perf_counter()
        speed, self._at = self._images / (now - self._at), now
        scalars = {"images_per_second": speed}
        if not torch.cuda.is_available():
            scalars["memory_mb"] = _peak_mb()
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


def _peak_mb() -> float:
    """Most memory that this process has held."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10
