"""A wait that takes long is named, a short one and one of another process is not."""

import time

from dense.waiting import waiting
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
