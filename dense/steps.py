"""Run a sequence of commands that can be killed and resumed."""

import contextlib
import hashlib
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from tqdm import tqdm

from dense import files
from dense.runs import RunError

STATE = "steps.json"
LOGS = "logs"


class StepError(Exception):
    """A sequence of steps cannot start or go on; the message says why."""


@dataclass(frozen=True)
class Step:
    """One command.

    Attributes:
        name: identifier in file names and in the state.
        title: what the terminal shows.
        template: the command after ``python``, with ``{...}`` for paths, which may hold spaces.
        total: length of the progress bar, in iterations or files; 0 is none.
        position: returns how many of them are done, given the output folder.
    """

    name: str
    title: str
    template: str
    total: int = 0
    position: Callable[[Path], int] = lambda out: 0

    def argv(self, places: Mapping[str, str]) -> list[str]:
        """The arguments after ``python``."""
        return [word.format(**places) for word in self.template.split()]

    def line(self, places: Mapping[str, str]) -> str:
        """The command for a shell."""
        return shlex.join(["python", *self.argv(places)])


class State:
    """Which steps are done and how long they took, saved as ``steps.json``.

    Args:
        out: folder of the file.
        digest: identifies the code that the steps run, see :func:`sources_digest`.
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
        """Run time of a step so far, over all runs."""
        return self._content["steps"].get(step.name, {}).get("seconds", 0.0)

    def done(self, step: Step) -> bool:
        return self._content["steps"].get(step.name, {}).get("done", False)

    def note(self, step: Step, seconds: float, done: bool) -> None:
        """Save a step's run time and whether it is done."""
        with self._lock:
            self._content["steps"][step.name] = {"seconds": round(seconds, 1), "done": done}
            self.save()

    def save(self) -> None:
        files.write(self._path, json.dumps(self._content, indent=1))


def sources_digest(root: Path, folders: Iterable[str], without: Iterable[Path]) -> str:
    """SHA-256 of the Python files below ``folders`` of ``root``, except those in ``without``."""
    digest = hashlib.sha256()
    left_out = {path.resolve() for path in without}
    for folder in folders:
        for path in sorted((root / folder).rglob("*.py")):
            if path.resolve() not in left_out:
                digest.update(str(path.relative_to(root)).encode() + path.read_bytes())
    return digest.hexdigest()


def prepare(out: Path, made: Sequence[str], digest: str, fresh: bool) -> State:
    """Load the state of a folder; start over if ``fresh`` or if the digest has changed.

    Args:
        out: an existing folder.
        made: files and folders that the steps write; only these are ever removed.
        digest: see :class:`State`.
        fresh: remove what the steps made before.

    Raises:
        StepError: one of ``made`` exists in a folder without a state.
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
            # STATE is the last: after a kill in this loop, the rest still counts as made here.
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        state = State(out, digest)
    state.save()
    (out / LOGS).mkdir(exist_ok=True)
    return state


def run_all(
    steps: Sequence[Step | Sequence[Step]],
    out: Path,
    places: Mapping[str, str],
    state: State,
    lock: int,
    cwd: Path,
    jobs: int = 1,
    keep: Callable[[], None] = lambda: None,
) -> None:
    """Run the steps that are not done, with progress on the terminal and one log file for each.

    Args:
        steps: in order; a sequence among them is run step after step, as one.
        out: the output folder.
        places: values of the templates' ``{...}``.
        state: from :func:`prepare`; updated while steps run.
        lock: from :func:`dense.runs.locked`.
        cwd: working directory of the commands.
        jobs: how many run in parallel; above 1 none may need another's result, but those of a
            sequence the results of earlier ones in it.
        keep: called after each entry of ``steps``, to write what is known so far.

    Raises:
        StepError: a step failed; the message has the end of its log. Parallel steps are terminated.
    """
    stop = threading.Event()
    chains = [[entry] if isinstance(entry, Step) else list(entry) for entry in steps]
    every = [step.name for steps in chains for step in steps]
    start = partial(subprocess.Popen, cwd=cwd, stderr=subprocess.STDOUT, pass_fds=[lock])

    def run(step: Step) -> None:
        if stop.is_set():
            return
        head = f"[{every.index(step.name) + 1}/{len(every)}]"
        if state.done(step):
            tqdm.write(f"{head} {step.title}: done before, in {state.seconds(step):.0f} s")
            return
        tqdm.write(f"{head} {step.line(places)}")
        sys.stdout.flush()
        try:
            _run(step, out, places, state, start, stop)
        except BaseException:
            stop.set()
            raise

    # Steps run in threads: signals are delivered to the main thread alone.
    with ThreadPoolExecutor(jobs) as pool:
        running = [pool.submit(lambda chain: [*map(run, chain)], chain) for chain in chains]
        try:
            for done in as_completed(running):
                done.result()
                keep()
        finally:
            stop.set()


def run_tool(name: str, work: Callable[[], None], *expected: type[Exception]) -> int:
    """Run the work of a command-line tool and return its exit status.

    :class:`StepError` and ``expected`` exceptions are printed in one line, status 1. Ctrl-C gives
    130, SIGTERM 143.
    """
    # For networks this small, and for parallel steps, one thread each is faster than threads that
    # compete for cores.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        work()
    except (StepError, RunError, *expected) as error:
        print(f"{name}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"\n{name}: stopped; the same command goes on from here", file=sys.stderr)
        return 130
    return 0


def _run(
    step: Step,
    out: Path,
    places: Mapping[str, str],
    state: State,
    start: Callable[..., subprocess.Popen],
    stop: threading.Event,
) -> None:
    log_path = out / LOGS / f"{step.name}.log"
    before, started = state.seconds(step), time.monotonic()

    def note(done: bool) -> None:
        state.note(step, before + time.monotonic() - started, done)

    with open(log_path, "ab") as log, _progress_bar(step, out) as bar:
        process = start([sys.executable, *step.argv(places)], stdout=log)
        noted = started
        try:
            while process.poll() is None and not stop.is_set():
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(timeout=1)
                bar.update(max(0, min(step.position(out), step.total) - bar.n))
                if time.monotonic() - noted > 10:
                    note(done=False)
                    noted = time.monotonic()
        finally:
            # It is still running only if this run is being stopped.
            if process.poll() is None:
                process.terminate()
                process.wait()
        if process.returncode == 0:
            bar.update(step.total - bar.n)
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


def _progress_bar(step: Step, out: Path) -> tqdm:
    return tqdm(
        total=step.total or None,
        initial=min(step.position(out), step.total),
        desc=f"  {step.title}",
        bar_format=None if step.total else "{desc}: {elapsed}",
        mininterval=1 if sys.stderr.isatty() else 15,
    )
