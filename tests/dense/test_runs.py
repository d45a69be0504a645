"""Folders of trainings: an earlier training is not overwritten, two do not share a folder."""

import errno
import json
import os
import signal
import subprocess
import sys
import time

import pytest

from dense import files, runs
from dense.runs import RunError, Stop, Stopped, claimed
from tests.support import environment

LEFT = ("model_0000009.pth", "iter_4.pth", "epoch_2.pth", "best_top1_epoch_2.pth", "metrics.json")


@pytest.mark.parametrize("name", [*LEFT, "20260101_120000/vis_data/scalars.json"])
def test_an_earlier_training_is_refused_and_not_touched(tmp_path, name):
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).write_text("precious")
    with pytest.raises(RunError, match=f"holds a training .{name}.: --resume .* --overwrite"):
        with claimed(tmp_path, resume=False, overwrite=False):
            pytest.fail("it started")
    assert (tmp_path / name).read_text() == "precious"
    with claimed(tmp_path, resume=True, overwrite=False) as start:
        start()
    assert (tmp_path / name).read_text() == "precious"


def test_overwriting_removes_the_training_alone_and_only_when_it_starts(tmp_path):
    for name in ("run.json", "report.html"):
        (tmp_path / name).touch()
    for name in (*LEFT, "last_checkpoint", "config.yaml", "log.txt.rank1", "x.pth.partial"):
        (tmp_path / name).write_text("old")
    (tmp_path / "20260101_120000/vis_data").mkdir(parents=True)
    for name in ("notes.md", "photo.jpg", "weights.pth"):
        (tmp_path / name).write_text("mine")
    with claimed(tmp_path, resume=False, overwrite=True) as start:
        assert (tmp_path / LEFT[0]).exists()
        start()
    left = sorted(path.name for path in tmp_path.iterdir())
    assert left == [runs.LOCK, "notes.md", "photo.jpg", "weights.pth"]


def test_both_options(tmp_path):
    with pytest.raises(RunError, match="name one"), claimed(tmp_path, resume=True, overwrite=True):
        pass


def test_only_the_first_process_looks(tmp_path, monkeypatch):
    (tmp_path / LEFT[0]).write_text("old")
    monkeypatch.setenv("RANK", "1")
    with claimed(tmp_path, resume=False, overwrite=True, launcher="pytorch") as start:
        start()
    assert (tmp_path / LEFT[0]).exists()
    # Without a launcher the variable is of something else.
    with pytest.raises(RunError), claimed(tmp_path, resume=False, overwrite=False):
        pass


def test_a_second_training_in_the_folder_is_refused(tmp_path):
    code = (
        "import os, sys, time; from dense.runs import claimed\n"
        "with claimed(sys.argv[1], resume=True, overwrite=False):\n"
        # Workers of a data loader inherit what is open, and may outlive their trainer.
        "    if not (child := os.fork()): os.close(1); time.sleep(9); os._exit(0)\n"
        "    print('in', flush=True); time.sleep(60)"
    )
    first = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)],
        stdout=subprocess.PIPE,
        text=True,
        env=environment(),
    )
    try:
        assert first.stdout.readline() == "in\n"
        with pytest.raises(RunError, match="another run.* works in"):
            with claimed(tmp_path, resume=True, overwrite=False):
                pass
    finally:
        first.kill()
        first.wait()
    with claimed(tmp_path, resume=True, overwrite=False):
        pass


def test_a_folder_that_cannot_be_one(tmp_path):
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file/below"):
        with pytest.raises(RunError, match="file is a file|cannot be written: Not a directory"):
            with claimed(path, resume=False, overwrite=False):
                pass


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_is_remembered(number):
    before = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    try:
        stop = Stop()
        assert not stop.asked
        os.kill(os.getpid(), number)
        time.sleep(0)
        assert stop.asked == number
    finally:
        for n, handler in zip((signal.SIGINT, signal.SIGTERM), before, strict=True):
            signal.signal(n, handler)


ENDS = """
import errno, sys
from dense import runs
def work():
    raise {error}
sys.argv = ["tools/train.py", "config.py", "--work-dir", "my runs"]
runs.run_tool("train", work, KeyError)
"""


@pytest.mark.parametrize(
    ("error", "status", "said"),
    [
        ("runs.RunError('no')", 1, "train: no"),
        ("KeyError('key')", 1, "train: 'key'"),
        (
            "OSError(errno.ENOSPC, 'No space left on device', 'a.pth')",
            1,
            "train: a.pth: No space left on device",
        ),
        (
            "runs.Stopped(2, 'iter_5.pth')",
            130,
            "train: stopped; iter_5.pth is written. To go on: python tools/train.py config.py "
            "--work-dir 'my runs' --resume",
        ),
        ("runs.Stopped(15, 'iter_5.pth')", 143, "iter_5.pth is written"),
    ],
)
def test_every_foreseen_end_is_one_line(error, status, said):
    done = subprocess.run(
        [sys.executable, "-c", ENDS.format(error=error)],
        capture_output=True,
        text=True,
        env=environment(),
    )
    assert done.returncode == status
    assert said in done.stderr and done.stderr.count("\n") == 1


@pytest.mark.parametrize("given", ["--resume", "--auto-resume", "--overwrite"])
def test_the_command_that_goes_on_resumes_and_removes_nothing(given):
    code = ENDS.format(error="runs.Stopped(2, 'iter_5.pth')").replace("--work-dir", given)
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment()
    )
    words = done.stderr.split("To go on: ")[1].split()
    assert len([word for word in words if word.endswith("resume")]) == 1
    assert "--overwrite" not in words


def test_other_errors_keep_their_traceback():
    done = subprocess.run(
        [sys.executable, "-c", ENDS.format(error="ZeroDivisionError")],
        capture_output=True,
        text=True,
        env=environment(),
    )
    assert done.returncode == 1 and "Traceback" in done.stderr


def test_stopped_is_no_exception_that_a_trainer_logs():
    assert not issubclass(Stopped, Exception)


# Files


def test_too_little_space_is_said_before_anything_is_written(tmp_path):
    path = files.write(tmp_path / "a.json", json.dumps(1))
    with pytest.raises(OSError, match="needs 1000000000000 MB") as full:
        files.write(path, "2", size=10**18)
    assert full.value.errno == errno.ENOSPC and full.value.filename == str(path)
    assert path.read_text() == "1" and list(tmp_path.iterdir()) == [path]
