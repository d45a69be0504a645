"""Checks of config values that come from a command line, for all three trainings."""

import argparse
from collections.abc import Callable, Iterable
from difflib import get_close_matches
from pathlib import Path
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


def listed_classes(text: str) -> tuple[list[str], list[tuple[int, ...]] | None]:
    """Class names, and their colours in masks, of ``--classes``: names or a file of them.

    >>> listed_classes("road,house")
    (['road', 'house'], None)

    Args:
        text: names with commas between them, or the path of a text file with a name on each line,
            which three numbers may follow: ``road 128 64 128``. The name ``-`` stands for a colour
            to ignore.

    Returns:
        The names, and for every name its colour ``(R, G, B)``, then those to ignore; None where
        no line has one.

    Raises:
        ValueError: some lines have a colour and others have none, or a colour is none or twice.
    """
    if "," in text or not Path(text).is_file():
        return [name.strip() for name in text.split(",")], None
    names, colours, ignored = [], [], []
    for line in filter(str.strip, Path(text).read_text().splitlines()):
        words = line.split()
        if len(words) < 4 or not all(word.isdigit() for word in words[-3:]):
            names.append(line.strip())
            continue
        name, colour = " ".join(words[:-3]), tuple(int(word) for word in words[-3:])
        if max(colour) > 255:
            raise ValueError(f"{text}: {line.strip()!r} has a number above 255")
        if colour in colours + ignored:
            raise ValueError(f"{text} has the colour {' '.join(map(str, colour))} twice")
        if name == "-":
            ignored.append(colour)
            continue
        names.append(name)
        colours.append(colour)
    if colours and len(colours) < len(names):
        raise ValueError(
            f"{text}: {len(colours)} of {len(names)} classes have a colour; all or none"
        )
    return names, [*colours, *ignored] if colours else None


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
