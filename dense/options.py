"""Checks of config values that come from a command line, for all three trainings."""

import argparse
from collections.abc import Callable, Iterable
from difflib import get_close_matches
from typing import Any

_POSITIVE = (
    *("max_iter", "max_iters", "max_epochs", "val_interval", "batch_size", "total_batch_size"),
    *("log_period", "accumulative_counts"),
)
_NOT_NEGATIVE = ("lr", "num_workers", "eval_period", "weight_decay")


def add_run_options(add: Callable, unit: str, folder: str) -> None:
    """Add the options that the three trainings share to a command line.

    >>> add_run_options(parser.add_argument, "epochs", "work dir")

    Args:
        add: ``add_argument`` of the tool's parser.
        unit: what the tool's trainings count: ``"iters"`` or ``"epochs"``.
        folder: what the tool calls the folder of a training.
    """
    add(
        *("--resume", "--auto-resume"),
        action="store_true",
        help="continue from the last complete checkpoint; without one, begin",
    )
    add("--overwrite", action="store_true", help=f"remove the training that the {folder} holds")
    add(
        f"--{unit}",
        type=_at_least_one,
        metavar="N",
        help=f"train N {unit}: warm-up, milestones, evaluation and checkpoints move in proportion",
    )
    add(
        "--early-stop",
        type=_at_least_one,
        metavar="N",
        help="stop when the metric of the best checkpoint has not risen in N evaluations",
    )


def _at_least_one(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text}: 1 or more is needed")
    return int(text)


def scaled(number: int, factor: float) -> int:
    """A number of iterations or epochs times a factor; 1 at least, and what is not positive stays.

    >>> scaled(500, 0.1), scaled(3, 0.1), scaled(-1, 0.1)
    (50, 1, -1)
    """
    return max(1, round(number * factor)) if number > 0 else number


def wrong_value(key: str, old: Any, new: Any) -> str | None:
    """Why a new value cannot replace a config's, or None.

    >>> wrong_value("optimizer.lr", 1e-4, "fast")
    "optimizer.lr='fast': a number is needed, such as 0.0001"

    Args:
        key: dotted key; its last part decides whether 0 or less is allowed.
        old: the config's value; None takes anything.
        new: the new value.
    """
    if isinstance(new, str) and new.startswith("${"):
        return None
    if isinstance(old, bool):
        if not isinstance(new, bool):
            return f"{key}={new!r}: True or False is needed"
    elif isinstance(old, int | float) and not _is_number(new) and new is not None:
        return f"{key}={new!r}: a number is needed, such as {old}"
    elif isinstance(old, int) and isinstance(new, float) and new != int(new) and old > 1:
        return f"{key}={new!r}: a whole number is needed, such as {old}"
    elif isinstance(old, dict) and not isinstance(new, dict) and new is not None:
        return f"{key}={new!r}: it holds {', '.join(map(str, old))}; name one of them after a dot"
    return wrong_range(key, new)


def wrong_range(key: str, value: Any) -> str | None:
    """Why a number is out of range for its key, or None."""
    name = key.rpartition(".")[2]
    if not _is_number(value):
        return None
    if name in _POSITIVE and not value > 0:
        return f"{key}={value!r}: more than 0 is needed"
    if name in _NOT_NEGATIVE and not value >= 0:
        return f"{key}={value!r}: 0 or more is needed"
    return None


def near(key: str, valid: Iterable[str]) -> str:
    """``"; did you mean 'max_iter'?"``, or the valid keys if none is near."""
    valid = sorted(valid)
    if close := get_close_matches(key, valid, n=1):
        return f"; did you mean {close[0]!r}?"
    return f"; {', '.join(valid)} are valid" if valid else ""


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
