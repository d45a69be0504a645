"""The hook that says and records what a training is."""

import torch
from mmengine.dist import get_world_size, master_only
from mmengine.hooks import Hook
from mmengine.optim import AmpOptimWrapper
from mmengine.registry import HOOKS
from mmengine.runner import Runner

from dense import journal


@HOOKS.register_module()
class Announce(Hook):
    """Log the first line of a training and keep its ``run.json``: see :mod:`dense.journal`.

    >>> custom_hooks = [dict(type="Announce")]
    """

    priority = "VERY_HIGH"

    @master_only
    def before_train(self, runner: Runner) -> None:
        """Log what the training starts with."""
        start = started(runner)
        runner.logger.info(str(start))
        journal.begin(runner.work_dir, start, runner.cfg.filename)

    @master_only
    def after_train(self, runner: Runner) -> None:
        """Record its time and memory."""
        journal.end(runner.work_dir)


def started(runner: Runner) -> journal.Start:
    """What a runner's training starts with, or goes on with."""
    wrapper = runner.optim_wrapper
    precision = "float32"
    if isinstance(wrapper, AmpOptimWrapper):
        # Without a dtype, it is autocast's default.
        precision = str(wrapper.cast_dtype or torch.float16).removeprefix("torch.")
    # An OptimWrapperDict has no number of its own.
    world, accumulated = get_world_size(), getattr(wrapper, "_accumulative_counts", 1)
    loader = runner.train_dataloader
    per_process = getattr(loader.batch_sampler, "batch_size", None) or loader.batch_size or 1
    if runner.iter:
        weights = f"resumed after {runner.iter} of {runner.max_iters} iterations"
    elif runner._load_from:
        weights = f"weights of {runner._load_from}"
    else:
        weights = journal.weights(runner.model)
    return journal.Start(
        device=journal.device_name(next(runner.model.parameters()).device, world),
        precision=precision,
        batch=per_process * world * accumulated,
        images=len(loader.dataset) if hasattr(loader.dataset, "__len__") else None,
        steps=runner.max_iters // accumulated,
        weights=weights,
    )
