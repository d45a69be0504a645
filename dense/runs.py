"""Folders of trainings: what an earlier training left, one training at a time, stopping, space.

>>> with runs.claimed("work_dirs/mine", resume=False, overwrite=False) as start:
...     start()
...     train()
"""

import contextlib
import errno
import fcntl
import multiprocessing
import os
import re
import shlex
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from dense.waiting import waiting

# What the three trainings write into their folder, of Detectron2 and of MMEngine.
_CHECKPOINTS = ("model_*.pth", "iter_*.pth", "epoch_*.pth", "best_*.pth", "last_checkpoint")
_LOGS = ("metrics.json", "[0-9]*_[0-9]*/vis_data/scalars.json")
_WRITTEN = (
    *_CHECKPOINTS,
    *("metrics.json", "metrics.png", "results.json", "log.txt*", "events.out.tfevents.*"),
    *("run.json", "report.html"),
    *("*.pth.partial", "config.yaml", "inference", "evaluation"),
)
_RUN_OF_MMENGINE = re.compile(r"\d{8}_\d{6}")
LOCK = ".lock"


class RunError(ValueError):
    """A training cannot use its folder; the message is one line."""


class Stopped(BaseException):
    """A training was stopped by a signal after it had written a checkpoint.

    Args:
        number: the signal.
        checkpoint: what was written.
    """

    def __init__(self, number: int, checkpoint: str):
        super().__init__(number, checkpoint)
        self.number, self.checkpoint = number, checkpoint

    @property
    def status(self) -> int:
        """The exit status: 130 for Ctrl-C, 143 for SIGTERM."""
        return 128 + self.number


@contextlib.contextmanager
def claimed(
    folder: str | os.PathLike,
    *,
    resume: bool,
    overwrite: bool,
    launcher: str = "none",
    first: bool | None = None,
) -> Iterator[Callable[[], None]]:
    """Lock the folder of a training, and refuse one that holds another training.

    Yields a function that removes the earlier training if ``overwrite`` is given; it is called
    when everything has been checked.

    Args:
        folder: created if missing.
        resume: the training continues the folder's.
        overwrite: remove what the earlier training wrote; other files stay.
        launcher: what started the processes; the first of them alone locks and removes.
        first: whether this is that process; None asks the launcher's variables.

    Raises:
        RunError: ``resume`` and ``overwrite`` together; the folder holds a training and neither is
            given; another training is at work in it; the path is a file, or cannot be written.
    """
    folder = Path(folder)
    if resume and overwrite:
        raise RunError("--resume continues the training and --overwrite removes it: name one")
    if not (is_first(launcher) if first is None else first):
        yield lambda: None
        return
    with locked(folder, patience=0, inherited=False):
        found = earlier(folder)
        if found and not resume and not overwrite:
            raise RunError(
                f"{folder} holds a training ({found}): --resume continues it, --overwrite removes "
                "it, and another folder leaves it as it is"
            )
        yield lambda: _clear(folder) if overwrite else None


def earlier(folder: Path) -> str | None:
    """The name of a file that an earlier training left in a folder, checkpoints first."""
    for pattern in (*_CHECKPOINTS, *_LOGS):
        if found := sorted(folder.glob(pattern)):
            return str(found[-1].relative_to(folder))
    return None


@contextlib.contextmanager
def locked(folder: Path, patience: float = 15, inherited: bool = True) -> Iterator[int]:
    """Lock a folder for one program; yields the lock's file descriptor.

    Args:
        folder: created if missing.
        patience: seconds to wait for the lock.
        inherited: programs that inherit the descriptor hold the lock too. False: this process
            alone, since the workers of a data loader may outlive a trainer that was killed.

    Raises:
        RunError: ``folder`` is a file or cannot be written, or another program holds the lock.
    """
    if folder.exists() and not folder.is_dir():
        raise RunError(f"{folder} is a file; a folder is needed")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = open(folder / LOCK, "a")  # noqa: SIM115
    except OSError as error:
        raise RunError(f"{folder} cannot be written: {error.strerror}") from error
    with lock:
        end = time.monotonic() + patience
        with waiting(f"waiting for another run to leave {folder}"):
            while not _lock(lock.fileno(), inherited):
                if time.monotonic() > end:
                    raise RunError(
                        f"another run, or a step that outlived one, works in {folder}: "
                        "wait for it or end it, then start again"
                    )
                time.sleep(0.5)
        yield lock.fileno()


def is_first(launcher: str = "pytorch") -> bool:
    """Whether this is the first of the processes that a launcher started."""
    variable = {"pytorch": "RANK", "slurm": "SLURM_PROCID", "mpi": "OMPI_COMM_WORLD_RANK"}
    return int(os.environ.get(variable.get(launcher, ""), 0)) == 0


class Stop:
    """Remembers Ctrl-C and SIGTERM until the end of an iteration; a second one stops at once.

    >>> stop = Stop()
    >>> if stop.asked: ...  # the signal's number
    """

    def __init__(self):
        self.asked = 0
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._note)

    def _note(self, number: int, frame: Any) -> None:
        if self.asked:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        self.asked = number


def run_tool(name: str, work: Callable[[], object], *expected: type[BaseException]) -> None:
    """Run the work of a training tool; every foreseen end is one line and an exit status.

    An ``expected`` exception, a :class:`RunError`, a full disk and a folder that cannot be written
    end with status 1. A training that was stopped says what continues it, and ends with 130 or 143.
    """
    try:
        work()
    except Stopped as stopped:
        # Loaders wait seconds for workers that are in the middle of a photo.
        for child in multiprocessing.active_children():
            child.kill()
        resuming = {"--resume", "--auto-resume"} & set(sys.argv)
        command = [*sys.argv, *([] if resuming else ["--resume"])]
        command = [word for word in command if word != "--overwrite"]
        print(
            f"{name}: stopped; {stopped.checkpoint} is written. To go on: "
            f"{shlex.join(['python', *command])}",
            file=sys.stderr,
        )
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(stopped.status)
    except (RunError, *expected) as error:
        # The report of a load has several lines.
        sys.exit(f"{name}: {' '.join(str(error).split())}")
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS, errno.EPERM):
            raise
        sys.exit(f"{name}: {error.filename or 'a file'}: {error.strerror}")


def _lock(descriptor: int, inherited: bool) -> bool:
    try:
        (fcntl.flock if inherited else fcntl.lockf)(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    # Some network file systems have no locks.
    except OSError as error:
        if error.errno == errno.EACCES:
            return False
        if error.errno not in (errno.ENOLCK, errno.ENOTSUP):
            raise
    return True


def _clear(folder: Path) -> None:
    """Remove what an earlier training wrote."""
    paths = [path for pattern in _WRITTEN for path in folder.glob(pattern)]
    paths += [path for path in folder.iterdir() if _RUN_OF_MMENGINE.fullmatch(path.name)]
    for path in paths:
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
