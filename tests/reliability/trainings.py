"""The three trainings in a short form, and whether two runs of one ended alike."""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dense import files
from tests.reliability.world import World, run_tool


@dataclass(frozen=True)
class Training:
    """A training of a few iterations, with checkpoints and validations in between.

    Attributes:
        tool: the tool.
        words: its words beside the usual ones of :meth:`World.words`.
        last: the checkpoint at its end.
        length: the options of ``{n}`` iterations with a validation and a checkpoint every 100.
        epoch: iterations of one epoch, for a training whose length counts epochs.
    """

    tool: str
    words: tuple[str, ...]
    last: str
    length: tuple[str, ...]
    epoch: int = 1

    def longer(self, iterations: int) -> tuple[str, ...]:
        """The options for about as many iterations."""
        return tuple(option.format(n=iterations // self.epoch) for option in self.length)

    def command(self, world: World, folder: Path, more: tuple[str, ...] = ()) -> list[str]:
        """The words after the tool's name, resuming in ``folder``; ``more`` options win."""
        usual = [w.replace(str(world["new"]), str(folder)) for w in world.words(self.tool)]
        at = usual.index("--cfg-options") if "--cfg-options" in usual else len(usual)
        flags = [word for word in self.words if word.startswith("--")]
        options = [word for word in self.words if not word.startswith("--")]
        return [*usual[:at], "--resume", *flags, *usual[at:], *options, *more]


TRAININGS = {
    "detector": Training(
        "train_detector",
        (
            *("train.max_iter=8", "train.checkpointer.period=2", "train.eval_period=4"),
            *("train.log_period=1", "train.seed=1", "model.backbone.bottom_up.drop_path_rate=0.3"),
        ),
        "model_final.pth",
        ("train.max_iter={n}", "train.checkpointer.period=100", "train.eval_period=100"),
    ),
    "segmentor": Training(
        "train_segmentor",
        (
            *("train_cfg.max_iters=8", "train_cfg.val_interval=4", "randomness.seed=1"),
            *("default_hooks.checkpoint.interval=2", "default_hooks.logger.interval=1"),
            *("default_hooks.checkpoint.max_keep_ckpts=-1", "log_processor.window_size=1"),
            "model.backbone.drop_path_rate=0.3",
        ),
        "iter_8.pth",
        (
            *("train_cfg.max_iters={n}", "train_cfg.val_interval=100"),
            *("default_hooks.checkpoint.interval=100", "default_hooks.checkpoint.max_keep_ckpts=2"),
        ),
    ),
    "classifier": Training(
        "pretrain",
        (
            *("--ema=0.9", "train_cfg.max_epochs=3", "randomness.seed=1"),
            # Gradients that were accumulated for a step are not in a checkpoint.
            "total_batch_size=4",
            *("default_hooks.logger.interval=1", "model.drop_path_rate=0.3"),
        ),
        "epoch_3.pth",
        (
            *("train_cfg.max_epochs={n}", "train_cfg.val_interval=33"),
            "default_hooks.checkpoint.interval=33",
        ),
        epoch=3,
    ),
}


def reference(kind: str, world: World, out: Path) -> Path:
    """The folder of an undisturbed run, made if missing; its file ``seconds`` has its time."""
    training, folder = TRAININGS[kind], out / "reference" / kind
    if not (folder / training.last).exists():
        began = time.monotonic()
        finish(training, world, folder)
        (folder / "seconds").write_text(f"{time.monotonic() - began:.2f}")
    return folder


def finish(training: Training, world: World, folder: Path) -> None:
    """Train, or go on, to the end."""
    status, said = run_tool(training.tool, training.command(world, folder))
    if status:
        raise RuntimeError(f"{training.tool} failed:\n{said[-3000:]}")


def differences(training: Training, one: Path, other: Path) -> tuple[int, int, int]:
    """Between two runs: differing tensors, lost lines of iterations, lost validations."""
    first, second = (
        dict(_tensors(torch.load(folder / training.last, weights_only=False)))
        for folder in (one, other)
    )
    tensors = len(first.keys() ^ second.keys())
    tensors += sum(not first[name].equal(second[name]) for name in first.keys() & second.keys())
    (trained, validated), (trained_too, validated_too) = map(_logged, (one, other))
    return tensors, len(trained - trained_too), len(validated - validated_too)


def _tensors(node: Any, place: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    """All tensors of weights, optimizer and averages; logs of a run are its own."""
    if isinstance(node, torch.Tensor):
        yield place, node
    elif isinstance(node, dict):
        for key, value in node.items():
            if key != "message_hub":
                yield from _tensors(value, f"{place}.{key}")
    elif isinstance(node, list | tuple):
        for number, value in enumerate(node):
            yield from _tensors(value, f"{place}.{number}")


def _logged(folder: Path) -> tuple[set[int], set[int]]:
    """Iterations with a loss, and iterations or epochs with a validation."""
    logs = [*folder.glob("metrics.json"), *folder.glob("*/vis_data/scalars.json")]
    trained, validated = set(), set()
    for entry in (entry for log in logs for entry in files.json_lines(log)):
        step = entry.get("iteration", entry.get("step"))
        if {"loss", "total_loss"} & entry.keys():
            trained.add(step)
        if {"bbox/AP", "mIoU", "top1"} & entry.keys():
            validated.add(step)
    return trained, validated
