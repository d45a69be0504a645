"""A row of commands, run one after another, that survives being killed."""

import contextlib
import fcntl
import hashlib
import json
import shlex
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from tqdm import tqdm

from dense import files

STATE = "steps.json"
LOGS = "logs"


class StepError(Exception):
    """Why a row of steps stops."""


@dataclass(frozen=True)
class Step:
    """One command.

    Attributes:
        name: a word, for files.
        title: what it does, for people.
        template: the command after ``python``, with ``{...}`` for paths, which may hold spaces.
        total: how many units it counts while it runs, 0 for none.
        position: how many of them are done, of the folder it works in.
    """

    name: str
    title: str
    template: str
    total: int = 0
    position: Callable[[Path], int] = lambda out: 0

    def argv(self, places: Mapping[str, str]) -> list[str]:
        """The words after ``python``."""
        return [word.format(**places) for word in self.template.split()]

    def line(self, places: Mapping[str, str]) -> str:
        """The command as one types it."""
        return shlex.join(["python", *self.argv(places)])


class State:
    """Which steps are done and what they took, kept in their folder.

    Args:
        out: the folder.
        digest: stands for the code the steps run, see :func:`sources_digest`.
    """

    def __init__(self, out: Path, digest: str):
        self._path = out / STATE
        self._digest = digest
        self._lock = threading.Lock()
        self._content = {"sources": digest, "steps": {}}
        with contextlib.suppress(FileNotFoundError, json.JSONDecodeError):
            self._content = json.loads(self._path.read_text())

    @property
    def outdated(self) -> bool:
        """Whether the code has changed since these steps ran."""
        return self._content["sources"] != self._digest

    def seconds(self, step: Step) -> float:
        """What a step has taken so far, over all runs."""
        return self._content["steps"].get(step.name, {}).get("seconds", 0.0)

    def done(self, step: Step) -> bool:
        """Whether a step has come to its end."""
        return self._content["steps"].get(step.name, {}).get("done", False)

    def note(self, step: Step, seconds: float, done: bool) -> None:
        """Write down how far a step is."""
        with self._lock:
            self._content["steps"][step.name] = {"seconds": round(seconds, 1), "done": done}
            self.save()

    def save(self) -> None:
        """Write the state, whole or not at all."""
        files.write(self._path, json.dumps(self._content, indent=1))


def sources_digest(root: Path, folders: Iterable[str], without: Iterable[Path]) -> str:
    """A digest of the Python files below some folders of ``root``, some of them left out."""
    digest = hashlib.sha256()
    left_out = {path.resolve() for path in without}
    for folder in folders:
        for path in sorted((root / folder).rglob("*.py")):
            if path.resolve() not in left_out:
                digest.update(str(path.relative_to(root)).encode() + path.read_bytes())
    return digest.hexdigest()


def prepare(out: Path, made: Sequence[str], digest: str, fresh: bool) -> State:
    """The folder and what is done in it; both new if asked for or if the code has changed.

    Args:
        out: the folder; made when missing.
        made: what the steps write into it; only that is ever removed.
        digest: see :class:`State`.
        fresh: start over.

    Raises:
        StepError: some of it is there and was not made by these steps.
    """
    made = (*made, LOGS, STATE)
    foreign = [name for name in made if (out / name).exists()]
    if foreign and not (out / STATE).exists():
        raise StepError(f"{out / foreign[0]} is there and was not made here; name another folder")
    state = State(out, digest)
    if state.outdated and not fresh:
        print("the code or the data has changed since the last run: starting over")
    if state.outdated or fresh:
        for name in made:
            path = out / name
            # The state last: as long as it is there, what is left is known as ours.
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        state = State(out, digest)
    state.save()
    (out / LOGS).mkdir(exist_ok=True)
    return state


@contextlib.contextmanager
def only_one(out: Path, patience: float = 15) -> Iterator[int]:
    """Keep a folder to one run. Steps inherit the lock: one that outlives its run still holds it.

    Args:
        out: the folder; made when missing.
        patience: seconds to wait for the lock, which data loaders' workers keep until they notice
            that their trainer was killed.

    Yields:
        The lock's file descriptor.

    Raises:
        StepError: the folder is a file, or another run works in it.
    """
    if out.exists() and not out.is_dir():
        raise StepError(f"{out} is a file; a folder is needed")
    out.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + patience
    with open(out / ".lock", "a") as lock:
        while not _locked(lock):
            if time.monotonic() > end:
                raise StepError(
                    f"another run, or a step that outlived one, works in {out}: "
                    "wait for it or end it, then start again"
                )
            time.sleep(0.5)
        yield lock.fileno()


def _locked(lock: TextIO) -> bool:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def run_all(
    steps: Sequence[Step],
    out: Path,
    places: Mapping[str, str],
    state: State,
    lock: int,
    cwd: Path,
    jobs: int = 1,
) -> None:
    """Run what is not done yet, with progress on the terminal and each step's output in a log.

    Args:
        steps: in their order.
        out: the folder they work in.
        places: what their templates name.
        state: what is done; kept up to date.
        lock: from :func:`only_one`.
        cwd: where the commands run.
        jobs: how many run side by side; with more than one, no step may need another's result.

    Raises:
        StepError: a step failed; with the end of its log. Those beside it are ended.
    """
    stop = threading.Event()

    def run(number: int, step: Step) -> None:
        if stop.is_set():
            return
        head = f"[{number}/{len(steps)}]"
        if state.done(step):
            tqdm.write(f"{head} {step.title}: done before, in {state.seconds(step):.0f} s")
            return
        tqdm.write(f"{head} {step.line(places)}")
        sys.stdout.flush()
        try:
            _run(step, out, places, state, lock, cwd, stop)
        except BaseException:
            stop.set()
            raise

    # Threads, so that a signal reaches this one while steps run.
    with ThreadPoolExecutor(jobs) as pool:
        running = [pool.submit(run, *numbered) for numbered in enumerate(steps, start=1)]
        try:
            for done in as_completed(running):
                done.result()
        finally:
            stop.set()


def _run(
    step: Step,
    out: Path,
    places: Mapping[str, str],
    state: State,
    lock: int,
    cwd: Path,
    stop: threading.Event,
) -> None:
    log_path = out / LOGS / f"{step.name}.log"
    before, started = state.seconds(step), time.monotonic()

    def note(done: bool) -> None:
        state.note(step, before + time.monotonic() - started, done)

    with open(log_path, "ab") as log:
        process = subprocess.Popen(
            [sys.executable, *step.argv(places)],
            cwd=cwd,
            stdout=log,
            stderr=subprocess.STDOUT,
            pass_fds=[lock],
        )
        try:
            _watch(step, out, process, lambda: note(done=False), stop)
        finally:
            # Still running only where this process is itself being stopped.
            if process.poll() is None:
                process.terminate()
                process.wait()
    if process.returncode and stop.is_set():
        return
    if process.returncode:
        tail = "\n".join(log_path.read_text(errors="replace").splitlines()[-15:])
        raise StepError(
            f"the step '{step.title}' failed with exit status {process.returncode}; "
            f"its command was\n  {step.line(places)}\n"
            f"its whole log is {log_path}, and ends with\n{tail}"
        )
    note(done=True)


def _watch(
    step: Step,
    out: Path,
    process: subprocess.Popen,
    note: Callable[[], None],
    stop: threading.Event,
) -> None:
    bar = tqdm(
        total=step.total or None,
        initial=min(step.position(out), step.total),
        desc=f"  {step.title}",
        bar_format=None if step.total else "{desc}: {elapsed}",
        mininterval=1 if sys.stderr.isatty() else 15,
    )
    with bar:
        noted = time.monotonic()
        while process.poll() is None and not stop.is_set():
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=1)
            bar.update(max(0, min(step.position(out), step.total) - bar.n))
            if time.monotonic() - noted > 10:
                note()
                noted = time.monotonic()
        if process.returncode == 0:
            bar.update(step.total - bar.n)
