"""Processes of their own for tests.

Importing PyTorch and the frameworks anew takes longer than most tests, so processes are forks of
servers that have imported them. A test's own process is no such server: after a backward pass on a
GPU, PyTorch has threads that a fork would lack.
"""

import multiprocessing
import os
import runpy
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from multiprocessing import forkserver
from pathlib import Path
from tempfile import TemporaryDirectory
from unittest.mock import patch

ROOT = Path(__file__).parents[1]
# What the servers have imported: everything, and what our packages need of others' at most.
_FRAMEWORKS = ("detectron2.engine", "mmseg.apis", "mmdet.apis", "mmengine.runner")
_PRELOADED = {
    "frameworks": ("tests.support", *_FRAMEWORKS),
    "bare": ("tests.processes", "torch._dynamo", "torchvision", "timm"),
}
_servers: dict[str, forkserver.ForkServer] = {}


def environment(**more: str) -> dict[str, str]:
    """Variables for a program of the checkout; one thread, for tests share the cores."""
    paths = filter(None, (str(ROOT), os.environ.get("PYTHONPATH")))
    threads = os.environ.get("OMP_NUM_THREADS", "1")
    shared = {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": threads}
    return {**os.environ, **shared, **more}


def run_python(*words: str | Path) -> subprocess.CompletedProcess[str]:
    """Run Python at the root of the checkout and keep what it prints."""
    return subprocess.run(
        [sys.executable, *map(str, words)],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
    )


def run_tool(
    name: str, *words: str | Path, cwd: Path = ROOT, limit: float | None = None
) -> subprocess.CompletedProcess[str]:
    """Run ``tools/<name>.py`` with these arguments in a process; see :func:`run_forked`."""
    script = partial(run_script, ROOT / f"tools/{name}.py", *words)
    return run_forked(script, cwd=cwd, limit=limit)[0]


def run_script(path: Path, *words: str | Path) -> None:
    """What Python does with a script and its arguments, for :func:`run_forked`."""
    sys.argv = [str(path), *map(str, words)]
    sys.path.insert(0, str(path.parent))
    runpy.run_path(str(path), run_name="__main__")


def run_without(packages: Sequence[str], code: str) -> subprocess.CompletedProcess[str]:
    """Run code for which some packages are not installed."""
    return run_bare(partial(run_code, code, without=packages))


def run_code(
    code: str, *words: str | Path, without: Sequence[str] = (), first: Path | None = None
) -> None:
    """What ``python -W ignore -c`` does, for :func:`run_bare`.

    Args:
        code: the program.
        words: its arguments.
        without: packages that are not installed for it.
        first: a folder that comes first on its path.
    """
    warnings.simplefilter("ignore")
    for name in list(sys.modules):
        if name.partition(".")[0] in without:
            del sys.modules[name]
    sys.modules.update(dict.fromkeys(without))
    sys.argv = ["-c", *map(str, words)]
    if first is not None:
        sys.path.insert(0, str(first))
    exec(compile(code, "<string>", "exec"), {"__name__": "__main__"})


def run_bare(function: Callable[[], None], *, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """As :func:`run_forked`, where PyTorch, torchvision and timm are imported and nothing of ours.

    For what must be imported anew: to show what an import needs, or from another folder.
    """
    return run_forked(function, cwd=cwd, server="bare")[0]


def run_forked(
    *functions: Callable[[], None],
    cwd: Path = ROOT,
    limit: float | None = None,
    server: str = "frameworks",
) -> list[subprocess.CompletedProcess[str]]:
    """Run functions at the same time, each in a process of its own.

    Args:
        functions: without arguments, picklable; what they raise ends the process as a program.
        cwd: where they run.
        limit: seconds after which the processes are killed; their ``returncode`` is None then.
        server: ``"frameworks"``, with PyTorch, the frameworks and our packages imported, or
            ``"bare"``.
    """
    if server not in _servers:
        _servers[server] = forkserver.ForkServer()
        _servers[server].set_forkserver_preload(list(_PRELOADED[server]))
    connect = _servers[server].connect_to_new_process
    context = multiprocessing.get_context("forkserver")
    end = None if limit is None else time.monotonic() + limit
    started = []
    with TemporaryDirectory() as folder:
        for number, function in enumerate(functions):
            printed = [Path(folder, f"{number}.{name}") for name in ("stdout", "stderr")]
            arguments = (function, cwd, environment(), *printed)
            started.append((context.Process(target=_as_a_program, args=arguments), printed))
            # multiprocessing has one server; which one a process comes from is said here only.
            with patch.object(forkserver, "connect_to_new_process", connect):
                started[-1][0].start()
        done = []
        for process, printed in started:
            process.join(end and max(0, end - time.monotonic()))
            status = process.exitcode
            process.kill()
            process.join()
            texts = (path.read_text() if path.exists() else "" for path in printed)
            done.append(subprocess.CompletedProcess([], status, *texts))
    return done


def _as_a_program(
    function: Callable[[], None], cwd: Path, environ: dict[str, str], stdout: Path, stderr: Path
) -> None:
    import torch

    for number, path in enumerate((stdout, stderr), 1):
        with open(path, "w") as file:
            os.dup2(file.fileno(), number)
    sys.stdout, sys.stderr = (open(number, "w", buffering=1) for number in (1, 2))
    torch.set_num_threads(1)
    os.environ.clear()
    os.environ.update(environ)
    os.chdir(cwd)
    function()
