"""Folders of trainings: an earlier training is not overwritten, two do not share a folder."""

import errno
import fcntl
import json
import os
import pickle
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

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


def test_everything_of_a_training_is_removed_and_nothing_else(tmp_path):
    """Of the three trainings, files and folders."""
    written = ["inference/a.json", "evaluation/b.json", "20260101_120000/vis_data/scalars.json"]
    written += [
        "events.out.tfevents.1.host",
        "metrics.png",
        "results.json",
        "log.txt",
        "last_checkpoint",
    ]
    written += ["model_final.pth", "best_mIoU_iter_8.pth", "a.pth.partial"]
    others = [
        "20260101_12000/a",
        "x20260101_120000/a",
        "inference.txt",
        "mine.pth",
        "my_model_1.pth",
    ]
    others += ["log.md", "config.py", "20260101_120000.txt", "deep/model_final.pth"]
    for name in (*written, *others):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    runs._clear(tmp_path)
    left = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    assert left == set(others)
    assert not {"inference", "evaluation", "20260101_120000"} & {p.name for p in tmp_path.iterdir()}
    runs._clear(tmp_path)


def test_the_newest_checkpoint_names_a_training(tmp_path):
    assert runs.earlier(tmp_path) is None
    for name in (
        "20260101_120000/vis_data/scalars.json",
        "metrics.json",
        "best_a.pth",
        "iter_1.pth",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
        assert runs.earlier(tmp_path) == name
    (tmp_path / "iter_2.pth").touch()
    assert runs.earlier(tmp_path) == "iter_2.pth"
    with claimed(tmp_path, resume=True, overwrite=False) as start:
        start()
    assert (tmp_path / "iter_2.pth").exists()


def test_a_training_neither_waits_for_its_folder_nor_lends_it(tmp_path, monkeypatch):
    asked, locked = [], runs.locked
    monkeypatch.setattr(runs, "locked", lambda *a, **k: asked.append((a, k)) or locked(*a, **k))
    with claimed(str(tmp_path / "a/b"), resume=False, overwrite=False, first=True):
        assert (tmp_path / "a/b" / runs.LOCK).is_file()
    with claimed(tmp_path / "c", resume=False, overwrite=False, first=False) as start:
        start()
    assert asked == [((tmp_path / "a/b",), dict(patience=0, inherited=False))]
    assert not (tmp_path / "c").exists()


@pytest.mark.parametrize("patience, sleeps", [(0, 1), (1, 3), (15, 31)])
def test_a_lock_is_waited_for(tmp_path, monkeypatch, patience, sleeps):
    slept, answers = [], []

    def lock(descriptor, inherited):
        assert os.fstat(descriptor) and inherited
        return answers.pop(0)

    monkeypatch.setattr(runs, "_lock", lock)
    clock = SimpleNamespace(monotonic=lambda: sum(slept), sleep=slept.append)
    monkeypatch.setattr(runs, "time", clock)
    options = {} if patience == 15 else {"patience": patience}
    answers += [False] * sleeps + [True]
    with runs.locked(tmp_path, **options) as descriptor:
        assert os.path.samestat(os.fstat(descriptor), os.stat(tmp_path / runs.LOCK))
    assert slept == [0.5] * sleeps
    slept.clear()
    answers[:] = [False] * (sleeps + 1)
    with pytest.raises(RunError, match=f"another run, or .* works in {tmp_path}: wait"):
        with runs.locked(tmp_path, **options):
            pass
    assert slept == [0.5] * sleeps and not answers


def test_who_holds_a_lock_and_where_there_are_none(monkeypatch):
    calls, flags = [], fcntl.LOCK_EX | fcntl.LOCK_NB
    for name in ("flock", "lockf"):
        monkeypatch.setattr(fcntl, name, lambda *a, name=name: calls.append((name, *a)))
    assert runs._lock(5, True) and runs._lock(6, False)
    assert calls == [("flock", 5, flags), ("lockf", 6, flags)]
    # Of a network file system without locks.
    free = {errno.EAGAIN: False, errno.EACCES: False, errno.ENOLCK: True, errno.ENOTSUP: True}
    for number, found in {**free, errno.EIO: None}.items():

        def refused(*_, number=number):
            raise OSError(number, "no")

        monkeypatch.setattr(fcntl, "flock", refused)
        if found is None:
            with pytest.raises(OSError, match="no"):
                runs._lock(5, True)
        else:
            assert runs._lock(5, True) is found


@pytest.mark.parametrize(
    "launcher, variable",
    [("pytorch", "RANK"), ("slurm", "SLURM_PROCID"), ("mpi", "OMPI_COMM_WORLD_RANK")],
)
def test_the_first_of_a_launchers_processes(monkeypatch, launcher, variable):
    for name in ("RANK", "SLURM_PROCID", "OMPI_COMM_WORLD_RANK"):
        monkeypatch.delenv(name, raising=False)
    assert runs.is_first(launcher) and runs.is_first("none")
    for rank in ("0", "1", "2"):
        monkeypatch.setenv(variable, rank)
        assert runs.is_first(launcher) is (rank == "0") and runs.is_first("none")
        assert runs.is_first() is (rank == "0" or launcher != "pytorch")


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


def test_a_second_signal_stops_at_once(monkeypatch):
    handlers, sent = {}, []
    monkeypatch.setattr(signal, "signal", handlers.__setitem__)
    monkeypatch.setattr(os, "kill", lambda *pair: sent.append((*pair, dict(handlers))))
    stop = Stop()
    assert set(handlers) == {signal.SIGINT, signal.SIGTERM}
    handlers[signal.SIGTERM](15, None)
    assert stop.asked == 15 and not sent
    handlers[signal.SIGINT](2, None)
    [(process, number, found)] = sent
    assert (process, number, found[signal.SIGINT]) == (os.getpid(), 2, signal.SIG_DFL)


@pytest.mark.parametrize(
    "name, ends",
    [(n, True) for n in ("ENOSPC", "EDQUOT", "EACCES", "EROFS", "EPERM")] + [("EIO", False)],
)
@pytest.mark.parametrize("file", ["a.pth", None])
def test_a_disk_that_takes_no_more_is_one_line(name, ends, file):
    def work():
        raise OSError(getattr(errno, name), "no more", *filter(None, [file]))

    with pytest.raises(SystemExit if ends else OSError) as ended:
        runs.run_tool("train", work)
    if ends:
        assert ended.value.code == f"train: {file or 'a file'}: no more"


def test_an_error_of_several_lines_is_one(monkeypatch):
    def work():
        raise KeyError("a\n  b")

    with pytest.raises(SystemExit, match=r"^train: 'a\\n b'$"):
        runs.run_tool("train", work, ValueError, KeyError)
    assert runs.run_tool("train", lambda: 5) is None


def test_a_stopped_training_leaves_no_worker(monkeypatch, capsys):
    ended = []
    workers = [SimpleNamespace(kill=lambda n=n: ended.append(n)) for n in "ab"]
    monkeypatch.setattr(runs.multiprocessing, "active_children", lambda: workers)
    monkeypatch.setattr(os, "_exit", ended.append)
    monkeypatch.setattr(sys, "argv", ["train.py", "--overwrite", "a b"])

    def work():
        raise Stopped(15, "iter_5.pth")

    runs.run_tool("train", work)
    assert ended == ["a", "b", 143]
    assert capsys.readouterr().err == (
        "train: stopped; iter_5.pth is written. To go on: python train.py 'a b' --resume\n"
    )


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


def test_stopped_is_the_same_in_another_process():
    stopped = pickle.loads(pickle.dumps(Stopped(15, "iter_5.pth")))
    assert (stopped.number, stopped.checkpoint, stopped.status) == (15, "iter_5.pth", 143)
    assert stopped.args == Stopped(15, "iter_5.pth").args == (15, "iter_5.pth")


# Files


def test_too_little_space_is_said_before_anything_is_written(tmp_path):
    path = files.write(tmp_path / "a.json", json.dumps(1))
    with pytest.raises(OSError, match="needs 1000000000000 MB") as full:
        files.write(path, "2", size=10**18)
    assert full.value.errno == errno.ENOSPC and full.value.filename == str(path)
    assert path.read_text() == "1" and list(tmp_path.iterdir()) == [path]
