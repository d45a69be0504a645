"""A wait that takes long is named, a short one and one of another process is not."""

import sys
import time
from types import SimpleNamespace

import pytest

from dense.waiting import _is_first, waiting
from tests.processes import run_python


def test_a_long_wait_is_named_with_its_time(capsys):
    with waiting("reading the annotations", after=0.05):
        time.sleep(0.6)
    printed = capsys.readouterr().err.splitlines()
    assert printed == ["reading the annotations ...", "reading the annotations: 1 s"]


def test_a_short_wait_and_other_ranks_are_silent(capsys, monkeypatch):
    with waiting("a short one"):
        pass
    monkeypatch.setenv("RANK", "1")
    with waiting("another rank's", after=0):
        time.sleep(0.1)
    assert capsys.readouterr().err == ""


def test_the_first_process_alone_speaks_after_two_seconds(monkeypatch, capsys):
    timers = []

    class Timer:
        def __init__(self, after, say):
            self.after, self.say, self.events = after, say, []
            timers.append(self)

        def start(self):
            self.events.append(("start", self.daemon))

        def cancel(self):
            self.events.append("cancel")

    monkeypatch.setattr("dense.waiting.threading.Timer", Timer)
    times = iter((10.0, 20.0, 23.4, 30.0))
    monkeypatch.setattr("dense.waiting.time", SimpleNamespace(monotonic=lambda: next(times)))
    monkeypatch.delenv("RANK", raising=False)

    def launched(available, initialized, rank):
        found = SimpleNamespace(
            is_available=lambda: available,
            is_initialized=lambda: initialized,
            get_rank=lambda: rank,
        )
        monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(distributed=found))

    launched(True, True, 1)
    with waiting("reading"):
        pass
    launched(True, True, 0)
    with pytest.raises(ValueError), waiting("reading"):
        timers[-1].say()
        raise ValueError
    assert [timer.after for timer in timers] == [2.0, 2.0]
    # It does not keep a program that ends.
    assert [timer.events for timer in timers] == [["cancel"], [("start", True), "cancel"]]
    assert capsys.readouterr().err == "reading ...\nreading: 3 s\n"
    for available, initialized, rank, variable, first in (
        *((True, False, 1, None, True), (False, True, 1, None, True), (True, True, 1, "0", False)),
        *((True, True, 0, "1", True), (True, False, 0, "1", False), (True, False, 0, "0", True)),
    ):
        launched(available, initialized, rank)
        if variable:
            monkeypatch.setenv("RANK", variable)
        assert _is_first() is first


SILENT = """
import runpy, sys
from contextlib import contextmanager
from pathlib import Path

import dense.waiting

said = []

@contextmanager
def waiting(what, after=2.0):
    said.append(what)
    yield
    said.pop()

class Stopped(BaseException):
    pass

class NoTorch:
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            raise Stopped

dense.waiting.waiting = waiting
sys.meta_path.insert(0, NoTorch())
# Where functions import it: what they are called with.
called = {
    "browse_data": "train_detector",
    "compare_families": "--data-root absent",
    "complexity": "backbones",
    "inspect_kernels": "--only offsets",
    "pretrain": "absent.py",
    "properties": "--write",
    "report": "absent",
    "show_kernels": "a.jpg --model swin_nano --checkpoint a.pth",
    "test_segmentor": "absent.py absent.pth",
    "train_detector": "--config-file absent.py",
    "train_segmentor": "absent.py",
}
for tool in sorted(Path("tools").glob("*.py")):
    words = called.get(tool.stem, "").split()
    sys.argv = [str(tool), *words]
    try:
        runpy.run_path(str(tool), run_name="__main__" if words else tool.stem)
    except Stopped:
        if not said:
            print("silent:", tool.name)
    said.clear()
    for name in list(sys.modules):
        if name.startswith(("mmengine", "timm", "backbones", "dense.")) and name != "dense.waiting":
            del sys.modules[name]
"""


def test_no_tool_imports_pytorch_in_silence():
    done = run_python("-c", SILENT)
    assert done.returncode == 0, done.stderr
    assert [line for line in done.stdout.splitlines() if line.startswith("silent:")] == []
