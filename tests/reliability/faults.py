"""Trainings in which one write fails, resumed, end as one in which none did.

Every write of a training is one of :func:`dense.files.write`, which syncs each file once, half-way:
what it replaces is whole then, and what it writes has not its name yet. There the n-th one fails,
by a full disk or by memory that is not there, for every n that a short training has.
"""

import errno
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from dense import files, journal
from tests.reliability import trainings
from tests.reliability.world import World
from tests.support import ROOT, run_forked, run_script

ERRORS: dict[str, Callable[[], Exception]] = {
    "full disk": lambda: OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
    "no memory": lambda: MemoryError("planted"),
}

# Without these files a training goes on, and says so where it happens.
WARNINGS = (
    f"{journal.FILE} is not written: ",
    "no plot of ",
    "no report of ",
    "the next run reads all masks again",
)

# May be empty: nothing is in them before the first iteration's line.
_LOGS = (".lock", "metrics.json", "scalars.json")


@dataclass(frozen=True)
class Outcome:
    """A run with one failing write; all but ``said`` should be 0.

    Attributes:
        silent: 1 if it ended with exit status 0, without a warning of :data:`WARNINGS`.
        unsaid: 1 if the last line does not say that the disk is full.
        left: files half written, and files without content.
        tensors, metrics, validations: what differs once it is resumed.
        said: the last line.
    """

    silent: int
    unsaid: int
    left: int
    tensors: int
    metrics: int
    validations: int
    said: str = ""


def run(kind: str, error: str, number: int, world: World, out: Path) -> Outcome | None:
    """Train with the ``number``-th write failing, resume, and compare.

    Returns:
        None if the training has fewer writes.
    """
    training = trainings.TRAININGS[kind]
    reference = trainings.reference(kind, world, out)
    folder = out / "faulty" / f"{kind}_{error.replace(' ', '_')}_{number}"
    shutil.rmtree(folder, ignore_errors=True)
    reached = folder.with_suffix(".reached")
    reached.unlink(missing_ok=True)
    tool = ROOT / f"tools/{training.tool}.py"
    words = training.command(world, folder)
    # What is known of masks is written only if they changed: each run has the same writes.
    for mask in world["seg/masks"].rglob("*.png"):
        mask.touch()
    (done,) = run_forked(partial(_failing, error, number, reached, tool, *words))
    if not reached.exists():
        shutil.rmtree(folder)
        return None
    output = done.stdout + done.stderr
    said = ([""] + output.strip().splitlines())[-1]
    goes_on = not done.returncode and any(warning in output for warning in WARNINGS)
    full = said.startswith(f"{training.tool}:") and "No space left on device" in said
    found = [path for path in folder.rglob("*") if path.is_file() and path.name not in _LOGS]
    left = sum(path.suffix == files.SUFFIX or not path.stat().st_size for path in found)
    trainings.finish(training, world, folder)
    outcome = Outcome(
        int(done.returncode == 0 and not goes_on),
        int(error == "full disk" and not (full or goes_on)),
        left,
        *trainings.differences(training, reference, folder),
        said.replace(str(out), "OUT")[:300],
    )
    shutil.rmtree(folder)
    reached.unlink()
    return outcome


def _failing(error: str, number: int, reached: Path, tool: Path, *words: str) -> None:
    """Run a tool, whose ``number``-th write fails."""
    sync, written = os.fsync, 0

    def fsync(file: int) -> None:
        nonlocal written
        written += 1
        if written == number:
            reached.parent.mkdir(parents=True, exist_ok=True)
            reached.touch()
            raise ERRORS[error]()
        sync(file)

    os.fsync = fsync
    run_script(tool, *words)
