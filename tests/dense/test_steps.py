"""What a sequence of commands says, keeps and counts."""

import hashlib
import json
import os
import signal
import sys
import threading
from pathlib import Path

import pytest

from dense import runs, steps
from dense.runs import RunError
from dense.steps import State, Step, StepError


class Bar:
    """In place of tqdm's bar: what it is made with, and where it goes."""

    made = []
    said = []

    def __init__(self, **options):
        self.options, self.n, self.went = options, options["initial"], []
        self.made.append(self)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def update(self, count):
        self.n += count
        self.went.append(count)

    @classmethod
    def write(cls, text):
        cls.said.append(text)


@pytest.fixture
def bars(monkeypatch):
    monkeypatch.setattr(Bar, "made", [])
    monkeypatch.setattr(Bar, "said", [])
    monkeypatch.setattr(steps, "tqdm", Bar)
    return Bar.made


class Process:
    """In place of a command, which takes some waits of a second and ends with a status."""

    def __init__(self, waits, status):
        self.waits, self.status, self.returncode, self.ended = waits, status, None, []

    def poll(self):
        self.returncode = self.returncode if self.waits else self.status
        return self.returncode

    def wait(self, timeout=None):
        self.ended.append(timeout)
        assert len(self.ended) < 100, "it waits for ever"
        if timeout is None:
            self.returncode = -15
        elif self.waits:
            self.waits -= 1
            raise steps.subprocess.TimeoutExpired("a", timeout)

    def terminate(self):
        self.ended.append("terminate")


def test_a_state_is_of_its_code_and_outlives_it(tmp_path):
    one, two = Step("one", "do one", "a"), Step("two", "do two", "b")
    state = State(tmp_path, "code")
    assert not state.outdated and not state.done(one) and state.seconds(one) == 0
    state.note(one, 12.345, True)
    state.note(two, 1.0, False)
    again = State(tmp_path, "code")
    assert (again.done(one), again.seconds(one), again.done(two)) == (True, 12.3, False)
    assert again.seconds(two) == 1 and State(tmp_path, "other").outdated and not again.outdated
    content = {"one": {"seconds": 12.3, "done": True}, "two": {"seconds": 1.0, "done": False}}
    expected = json.dumps({"sources": "code", "steps": content}, indent=1)
    assert (tmp_path / "steps.json").read_text() == expected
    (tmp_path / "steps.json").write_text("{")
    assert not State(tmp_path, "code").outdated and not State(tmp_path, "code").done(one)


def test_a_digest_is_of_names_and_contents(tmp_path):
    """The same for whoever has the same files; of every folder, deep ones too."""
    for name, text in (("a/x.py", "1"), ("a/deep/y.py", "2"), ("b/z.py", "3"), ("c/z.py", "4")):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)

    def digest(without=()):
        return steps.sources_digest(tmp_path, ("a", "b"), without)

    named = b"a/deep/y.py" + b"2" + b"a/x.py" + b"1" + b"b/z.py" + b"3"
    assert digest() == hashlib.sha256(named).hexdigest()
    found = {digest(), digest([tmp_path / "b/z.py"]), digest([tmp_path / "a/../a/x.py"])}
    (tmp_path / "c/z.py").write_text("5")
    assert digest() in found
    for old, new in (("a/x.py", "a/w.py"), ("a/deep/y.py", "a/deep/v.py")):
        (tmp_path / old).rename(tmp_path / new)
        found.add(digest())
    (tmp_path / "a/w.py").write_text("2")
    assert len(found | {digest()}) == 6


def test_what_changes_starts_over_and_says_so(tmp_path, capsys):
    out, step = tmp_path, Step("one", "do one", "a")

    def prepared(digest="code", fresh=False):
        state = steps.prepare(out, ("made", "folder"), digest, fresh)
        assert (out / "logs").is_dir() and (out / "steps.json").is_file() and not state.outdated
        return state

    changed = "the code or the data has changed since the last run: starting over\n"
    for digest, fresh, kept, said in (
        *(("code", False, False, ""), ("code", False, True, ""), ("code", True, False, "")),
        *(("new", False, False, changed), ("newer", True, False, "")),
    ):
        state = prepared(digest, fresh)
        assert state.done(step) is kept
        assert (out / "made").exists() is (out / "folder/x").exists() is kept
        assert (out / "logs/a.log").exists() is kept and capsys.readouterr().out == said
        state.note(step, 1.0, True)
        (out / "folder").mkdir(exist_ok=True)
        for name in ("made", "folder/x", "logs/a.log"):
            (out / name).touch()
    for name in ("folder", "logs"):
        (tmp_path / "other" / name).mkdir(parents=True)
        with pytest.raises(StepError, match=f"other/{name} is there and was not made here; name"):
            steps.prepare(tmp_path / "other", ("made", "folder"), "code", False)
        (tmp_path / "other" / name).rmdir()


@pytest.mark.parametrize("total, initial", [(7, 3), (0, 0)])
def test_the_bar_of_a_step(bars, tmp_path, monkeypatch, total, initial):
    step = Step("one", "do one", "a", total, lambda out: 3 if out == tmp_path else 99)
    for terminal, interval in ((True, 1), (False, 15)):
        monkeypatch.setattr(sys.stderr, "isatty", lambda found=terminal: found, raising=False)
        steps._progress_bar(step, tmp_path)
        assert bars.pop().options == dict(
            total=total or None,
            initial=initial,
            desc="  do one",
            bar_format=None if total else "{desc}: {elapsed}",
            mininterval=interval,
        )
    # More than all is all.
    steps._progress_bar(Step("one", "do one", "a", 7, lambda out: 9), tmp_path)
    assert bars.pop().options["initial"] == 7


@pytest.fixture
def run(bars, tmp_path, monkeypatch):
    """A function that runs a step as a process of some seconds, which writes into its log; returns
    what was noted, the process and the bar."""

    def call(waits, status=0, places=(2,), total=9, stop_at=None):
        (tmp_path / "logs").mkdir(exist_ok=True)
        state, stop, noted, now = State(tmp_path, "code"), threading.Event(), [], [0.0]
        monkeypatch.setattr(steps.time, "monotonic", lambda: now[0])
        process, left = Process(waits, status), list(places)
        wait = process.wait

        def waited(timeout=None):
            now[0] += timeout or 0
            if now[0] == stop_at:
                stop.set()
            wait(timeout)

        process.wait = waited
        note = state.note
        monkeypatch.setattr(state, "note", lambda *a: noted.append(a[1:]) or note(*a))
        position = lambda out: left.pop(0) if len(left) > 1 else left[0]  # noqa: E731
        step = Step("one", "do one", "a {out}", total, position)

        def start(words, stdout):
            assert words == [sys.executable, "a", "/x y"]
            stdout.write("".join(f"line {n}\n" for n in range(20)).encode())
            return process

        try:
            steps._run(step, tmp_path, {"out": "/x y"}, state, start, stop)
        finally:
            self.noted, self.process = noted, process
        return noted, process, bars[-1]

    self = call
    return call


def test_a_step_is_followed_to_its_end(run):
    noted, process, bar = run(3, places=(2, 3, 3, 5, 99))
    assert noted == [(3.0, True)] and process.ended == [1, 1, 1]
    # From where it was, never back, and to its end.
    assert (bar.options["initial"], bar.went, bar.n) == (2, [1, 0, 2, 4], 9)
    # The time so far is kept every ten seconds; a second run adds to it.
    noted, _, bar = run(23, places=(4, 1))
    assert noted == [(3.0 + 11, False), (3.0 + 22, False), (3.0 + 23, True)]
    assert set(bar.went[:-1]) == {0} and bar.n == 9


def test_a_step_is_stopped_with_the_others(run):
    noted, process, bar = run(9, stop_at=4)
    assert noted == [] and process.ended == [1, 1, 1, 1, "terminate", None] and bar.n == 2


def test_a_step_that_fails_shows_the_end_of_its_log(run, tmp_path):
    with pytest.raises(StepError) as failed:
        run(1, status=3)
    lines = "\n".join(f"line {n}" for n in range(5, 20))
    assert str(failed.value) == (
        "the step 'do one' failed with exit status 3; its command was\n  python a '/x y'\n"
        f"its whole log is {tmp_path}/logs/one.log, and ends with\n{lines}"
    )
    assert run.noted == [] and run.process.ended == [1]


def test_steps_are_numbered_over_all_sequences(bars, tmp_path, monkeypatch):
    every = [Step(n, f"do {n}", f"{n}.py {{out}}") for n in "abcd"]
    state, ran, kept = State(tmp_path, "code"), [], []
    state.note(every[1], 71.6, True)
    monkeypatch.setattr(steps, "_run", lambda step, *_: ran.append(step.name))
    todo = [every[0], every[1:3], every[3]]
    keep = lambda: kept.append(len(ran))  # noqa: E731
    pools, pool = [], steps.ThreadPoolExecutor
    monkeypatch.setattr(steps, "ThreadPoolExecutor", lambda jobs: pools.append(jobs) or pool(jobs))
    steps.run_all(todo, tmp_path, {"out": "/o"}, state, 0, tmp_path, keep=keep)
    # One after the other, if nothing else is asked for.
    assert pools == [1]
    assert Bar.said == [
        "[1/4] python a.py /o",
        "[2/4] do b: done before, in 72 s",
        "[3/4] python c.py /o",
        "[4/4] python d.py /o",
    ]
    assert ran == ["a", "c", "d"] and len(kept) == 3

    # One that fails keeps the others from beginning.
    def fails(step, *_):
        raise StepError(step.name)

    monkeypatch.setattr(steps, "_run", fails)
    Bar.said.clear()
    with pytest.raises(StepError, match="^a$"):
        steps.run_all(todo, tmp_path, {"out": "/o"}, state, 0, tmp_path)
    assert Bar.said == ["[1/4] python a.py /o"]


@pytest.mark.slow
def test_a_command_has_its_folder_its_log_and_the_lock(tmp_path):
    code = "import os, sys; print(os.getcwd()); print('to stderr', file=sys.stderr); os.fstat({})"
    folder = tmp_path / "here"
    folder.mkdir()
    with runs.locked(tmp_path / "out") as lock:
        (tmp_path / "say.py").write_text(code.format(lock))
        state = steps.prepare(tmp_path / "out", (), "code", False)
        step = Step("say", "say it", f"{tmp_path}/say.py")
        steps.run_all([step], tmp_path / "out", {}, state, lock, folder)
    log = (tmp_path / "out/logs/say.log").read_text()
    assert sorted(log.splitlines()) == sorted([str(folder), "to stderr"]) and state.done(step)


@pytest.mark.parametrize(
    "error, status, said",
    [
        (None, 0, ""),
        (StepError("a\nb"), 1, "demo: a\nb\n"),
        (RunError("no"), 1, "demo: no\n"),
        (KeyError("key"), 1, "demo: 'key'\n"),
        (KeyboardInterrupt(), 130, "\ndemo: stopped; the same command goes on from here\n"),
        (ZeroDivisionError(), None, ""),
    ],
)
def test_every_end_has_its_status(error, status, said, monkeypatch, capsys):
    handlers = {}
    monkeypatch.setattr(signal, "signal", handlers.__setitem__)
    for threads in (None, "3"):
        monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
        if threads:
            monkeypatch.setenv("OMP_NUM_THREADS", threads)

        def work(threads=threads):
            assert os.environ["OMP_NUM_THREADS"] == (threads or "1")
            if error:
                raise error

        if status is None:
            with pytest.raises(ZeroDivisionError):
                steps.run_tool("demo", work, KeyError)
        else:
            assert steps.run_tool("demo", work, KeyError) == status
        assert os.environ["OMP_NUM_THREADS"] == (threads or "1")
        assert capsys.readouterr().err == said
    with pytest.raises(SystemExit) as ended:
        handlers[signal.SIGTERM](15, None)
    assert ended.value.code == 143


def test_words_of_a_template_stay_words():
    step = Step("a", "do a", "tools/a.py --out {out} x={out}/b", 5)
    assert step.argv({"out": "/my out"}) == ["tools/a.py", "--out", "/my out", "x=/my out/b"]
    assert step.line({"out": "/my out"}) == "python tools/a.py --out '/my out' 'x=/my out/b'"
    assert step.position(Path()) == 0 == Step("a", "b", "c").total
