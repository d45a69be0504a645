"""Atomic writes: the new file or the old one, whatever comes between."""

import ast
import errno
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from dense import files
from tests.support import ROOT, environment


@pytest.mark.parametrize(
    "content, expected",
    [
        ("a line\r\nand ünicode\n", "a line\r\nand ünicode\n".encode()),
        (b"\x00\xff", b"\x00\xff"),
        (lambda partial: partial.write_bytes(b"by a function"), b"by a function"),
    ],
    ids=["text", "bytes", "function"],
)
@pytest.mark.parametrize("old", [None, b"an old and longer content of the same file"])
def test_the_target_holds_what_was_written(tmp_path, content, expected, old):
    path = tmp_path / "file.json"
    if old is not None:
        path.write_bytes(old)
    assert files.write(str(path), content) == path
    assert path.read_bytes() == expected
    assert list(tmp_path.iterdir()) == [path]


def test_the_file_is_replaced_when_it_is_on_the_disk(tmp_path, monkeypatch):
    """Whoever has opened the old one reads all of it."""
    target, done = tmp_path / "target", []
    target.write_text("the old content")
    sync, replace = os.fsync, os.replace

    def synced(file: int) -> None:
        done.append(os.fstat(file).st_ino)
        sync(file)

    def replaced(source: Path, path: Path) -> None:
        done.append("replaced")
        replace(source, path)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", replaced)
    with open(target) as reader:
        files.write(target, "new")
        assert reader.read() == "the old content"
    assert done == [target.stat().st_ino, "replaced"]


def test_torch_saves_through_it(tmp_path):
    weights = {"weight": torch.rand(3, 4)}
    path = files.write(tmp_path / "model.pth", lambda partial: torch.save(weights, partial))
    assert torch.load(path)["weight"].equal(weights["weight"])


@pytest.mark.parametrize("error", [ValueError("unfit"), KeyboardInterrupt()])
def test_a_failing_writer_leaves_the_old_file_alone(tmp_path, error):
    path = tmp_path / "file.json"
    path.write_text("old")

    def half(partial):
        partial.write_text("half of the n")
        raise error

    with pytest.raises(type(error)) as raised:
        files.write(path, half)
    assert raised.value is error
    assert any(str(path) in note for note in error.__notes__)
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_a_full_disk_is_an_error_that_names_the_target(tmp_path):
    path = tmp_path / "file.json"
    path.write_text("old")

    def full(partial):
        partial.write_text("half of the n")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(OSError, match="not written: No space left on device") as raised:
        files.write(path, full)
    assert raised.value.filename == str(path) and raised.value.errno == errno.ENOSPC
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    "name, kind", [("none/file", FileNotFoundError), ("folder", IsADirectoryError)]
)
def test_a_place_that_cannot_be_written_is_named(tmp_path, name, kind):
    (tmp_path / "folder").mkdir()
    with pytest.raises(kind) as raised:
        files.write(tmp_path / name, "text")
    assert raised.value.filename == str(tmp_path / name)
    assert list(tmp_path.iterdir()) == [tmp_path / "folder"]


def test_space_for_just_as_much(tmp_path, monkeypatch):
    asked = []
    usage = SimpleNamespace(free=5_000_000)
    monkeypatch.setattr(files.shutil, "disk_usage", lambda path: asked.append(path) or usage)
    path = files.write(tmp_path / "a", "text", size=5_000_000)
    assert asked == [tmp_path] and path.read_text() == "text"
    for size, needed in ((5_000_001, 5), (7_600_000, 8)):
        with pytest.raises(OSError) as full:
            files.write(tmp_path / "b", "text", size=size)
        assert full.value.strerror == (
            f"not written: it needs {needed} MB, 5 MB are free on its disk"
        )
        assert (full.value.errno, full.value.filename) == (errno.ENOSPC, str(tmp_path / "b"))
    asked.clear()
    files.write(tmp_path / "c", "text")
    assert asked == [] and not (tmp_path / "b").exists()


def test_a_line_is_sorted():
    assert files.json_line({"b": 1, "a": [2]}) == '{"a": [2], "b": 1}\n'


def test_another_files_error_keeps_its_name(tmp_path):
    with pytest.raises(FileNotFoundError) as raised:
        files.write(tmp_path / "copy", lambda partial: partial.write_bytes(open("gone").read()))
    assert raised.value.filename == "gone"
    assert any(str(tmp_path / "copy") in note for note in raised.value.__notes__)


def test_a_kill_leaves_the_old_file_and_the_next_write_succeeds(tmp_path):
    path = tmp_path / "file.json"
    path.write_text("old")
    code = (
        "import sys, time\n"
        "from dense import files\n"
        "def forever(partial):\n"
        "    partial.write_text('half of the n')\n"
        "    print('writing', flush=True)\n"
        "    time.sleep(600)\n"
        "files.write(sys.argv[1], forever)\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(path)],
        env=environment(),
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout.readline() == "writing\n"
        process.send_signal(signal.SIGKILL)
    assert path.read_text() == "old"
    files.write(path, "new")
    assert path.read_text() == "new" and list(tmp_path.iterdir()) == [path]


def test_a_log_is_read_but_for_the_line_that_a_kill_cut_off(tmp_path):
    log = tmp_path / "metrics.json"
    log.write_text('{"loss": 2.0}\n\n3\n{"loss": 1.0}\n{"los')
    assert files.json_lines(log) == [{"loss": 2.0}, {"loss": 1.0}]


WRITERS = ("write_text", "write_bytes", "save", "save_file", "savefig", "dump", "copyfile", "move")
# Pictures that a step's mark follows, temporary folders, a compiler's work space, another
# environment's files.
ELSEWHERE = (
    "dense/files.py",
    "dense/demo/scenes.py",
    "dense/analysis/kernels/launches.py",
    "dense/detection/reporting.py",
    "dense/export/files.py",
    "dense/openmmlab/mmcv_lite.py",
    "tools/demo.py",
    "tools/setup_environment.py",
)


def test_every_result_is_written_through_it():
    """What the package and the tools write is a file of ``files.write``, or named partial."""
    plain = {
        f"{path.relative_to(ROOT)}:{call.lineno} {ast.unparse(call)}"
        for folder in ("backbones", "dense", "tools")
        for path in (ROOT / folder).rglob("*.py")
        if str(path.relative_to(ROOT)) not in ELSEWHERE
        for call in written_plainly(ast.parse(path.read_text()))
    }
    assert not plain


def written_plainly(tree: ast.AST) -> Iterator[ast.Call]:
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    atomic = [call for call in calls if ast.unparse(call.func) in ("files.write", "super().save")]
    inside = {node for call in atomic for node in ast.walk(call)}
    for call in calls:
        name, text = ast.unparse(call.func).rsplit(".")[-1], ast.unparse(call)
        opened = name == "open" and "'w" in text and "lock" not in text
        saved = name in WRITERS and isinstance(call.func, ast.Attribute) and call.args
        # The checkpointer's own method calls files.write.
        kept = any(word in text for word in ("partial", "checkpointer.", "buffer"))
        if (opened or saved) and not kept and call not in inside:
            yield call
