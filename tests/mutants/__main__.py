"""Plant mistakes one at a time, run the tests of their part, and list what no test noticed.

    python -m tests.mutants --seed 1                  # 150 mistakes, OUT/report.md
    python -m tests.mutants --seed 1 --resume         # go on after a kill of this command
    python -m tests.mutants --seed 1 --again          # the survivors once more, after mending
    python -m tests.mutants --measure                 # which tests run each line: once, and faster

The tests run in a copy of the tree, in forks of a process that has the frameworks imported.
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from importlib import import_module
from pathlib import Path

os.environ |= {"OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
if not Path("/dev/nvidia0").exists():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from tqdm import tqdm  # noqa: E402

from tests.mutants.mistakes import Mistake, draw  # noqa: E402
from tests.mutants.parts import covering  # noqa: E402
from tests.mutants.touched import Touched, measure  # noqa: E402

ROOT = Path(__file__).parents[2]
FOLDERS = ("backbones", "dense", "configs", "tools")
EQUIVALENT = Path(__file__).with_name("equivalent.json")
# C files get this part of the mistakes.
OF_C = 15
PRELOADED = ("torch", "timm", "torchvision", "mmengine.runner", "mmseg.apis", "mmdet.apis")
PRELOADED += ("detectron2.engine", "transformers", "onnxruntime", "matplotlib.pyplot", "pytest")
# Tests of other parts that run a line: so many of them are tried.
ELSEWHERE = 100
SHORT = "not (e2e or chain or kernels or peers or ecosystem)"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--seed", type=int, default=0, help="which mistakes are drawn (%(default)s)")
    add("--count", type=int, default=150, help="how many (%(default)s)")
    add("--only", default="", help="files whose path holds this text")
    add("--jobs", type=int, default=1, help="mistakes at the same time (%(default)s)")
    add("--out", type=Path, default=Path("work_dirs/mutants"), help="(%(default)s)")
    add("--limit", type=int, default=1200, help="seconds of the tests of one (%(default)s)")
    add("--resume", action="store_true", help="keep the outcomes in OUT")
    add("--again", action="store_true", help="as --resume, and run the survivors again")
    add("--measure", action="store_true", help="write which tests run each line into OUT, and end")
    args = parser.parse_args()

    args.out.mkdir(parents=True, exist_ok=True)
    if args.measure:
        measure(ROOT, args.out, tracked(args.only), SHORT, args.jobs)
        return 0
    outcomes = Outcomes(args.out / f"seed{args.seed}.jsonl", args.resume or args.again)
    drawn = drawn_over(tracked(args.only), args.count, args.seed)
    missing = [
        m for m in drawn if outcomes.of(m) in ((None, "survived") if args.again else (None,))
    ]
    if missing:
        for name in PRELOADED:
            try:
                import_module(name)
            except ImportError as error:
                print(f"{name}: {error}", file=sys.stderr)
        run_all(missing, args, outcomes)
    report = written(drawn, outcomes)
    (args.out / "report.md").write_text(report)
    print(report)
    return 0


def tracked(only: str) -> list[str]:
    """The sources under version control."""
    listed = subprocess.run(
        ["git", "ls-files", *FOLDERS], cwd=ROOT, capture_output=True, text=True, check=True
    )
    paths = listed.stdout.split()
    return [p for p in paths if p.endswith((".py", ".c", ".h")) and only in p]


def drawn_over(paths: list[str], count: int, seed: int) -> list[Mistake]:
    """Mistakes of Python, and a few of C."""
    c = [path for path in paths if not path.endswith(".py")]
    few = count if len(c) == len(paths) else count // OF_C if c else 0
    python = draw(ROOT, [path for path in paths if path not in c], count - few, seed)
    return python + draw(ROOT, c, few, seed)


class Outcomes:
    """A line of a file for each mistake that was run; the last one counts."""

    def __init__(self, path: Path, keep: bool):
        self.path = path
        if not keep:
            path.unlink(missing_ok=True)
        self.read()

    def read(self) -> None:
        lines = self.path.read_text().splitlines() if self.path.exists() else ()
        self.found = {self._key(entry): entry for entry in map(json.loads, lines)}

    def add(self, mistake: Mistake, outcome: str, failed: str, seconds: float) -> None:
        entry = dict(known(mistake), outcome=outcome, failed=failed, seconds=round(seconds))
        with open(self.path, "a") as file:
            file.write(json.dumps(entry) + "\n")

    def of(self, mistake: Mistake) -> str | None:
        return self.found.get(self._key(known(mistake)), {}).get("outcome")

    @staticmethod
    def _key(entry: dict) -> tuple[str, str, str]:
        return entry["path"], entry["was"], entry["is"]


def known(mistake: Mistake) -> dict[str, str]:
    """By what a mistake is found again where other lines of its file have changed."""
    was, instead = mistake.lines((ROOT / mistake.path).read_bytes())
    return {"path": mistake.path, "was": was, "is": instead}


# Running


def run_all(mistakes: list[Mistake], args: argparse.Namespace, outcomes: Outcomes) -> None:
    """In as many processes as jobs, each with a tree of its own."""
    workers = []
    for job in range(args.jobs):
        if pid := os.fork():
            workers.append(pid)
            continue
        run_some(mistakes[job :: args.jobs], job, args, outcomes)
        os._exit(0)
    if any(os.waitpid(pid, 0)[1] for pid in workers):
        sys.exit("mutants: a process ended early; --resume goes on")
    outcomes.read()


def run_some(
    mistakes: list[Mistake], job: int, args: argparse.Namespace, outcomes: Outcomes
) -> None:
    tree = copied(args.out.resolve() / f"tree{job}")
    log = args.out / f"last{job}.log"
    touched = Touched(ROOT, args.out) if (args.out / "measured.json").exists() else None
    for mistake in tqdm(mistakes, f"job {job}", position=job, unit="mistake"):
        since = time.monotonic()
        text = (ROOT / mistake.path).read_bytes()
        (tree / mistake.path).write_bytes(mistake.made(text))
        part, outcome, failed = covering(mistake.path), "survived", ""
        few, others = touched.tests(mistake.path, mistake.start, part) if touched else ([], [])
        # Others of the part may notice what a started process does, or an import.
        for tests in filter(None, (few, others[:ELSEWHERE], part)):
            if outcome == "survived":
                outcome, failed = tested(tree, tests, log, args.limit)
        (tree / mistake.path).write_bytes(text)
        if failed and tested(tree, (failed,), log, args.limit)[0] != "survived":
            outcome = "unsound"
        outcomes.add(mistake, outcome, failed, time.monotonic() - since)
        if outcome != "noticed":
            tqdm.write(f"{outcome} {failed}\n{mistake.diff(text)}")


def tested(tree: Path, tests: Sequence[str], log: Path, limit: int) -> tuple[str, str]:
    """Run tests of a tree in a fork; returns ``OUTCOMES``' word and the first that failed."""
    first = log.with_suffix(".failed")
    first.write_text("")
    pid = os.fork()
    if not pid:
        in_fork(tree, tests, log, first)
    end, done, status = time.monotonic() + limit, 0, 0
    while not done and time.monotonic() < end:
        time.sleep(0.1)
        done, status = os.waitpid(pid, os.WNOHANG)
    with suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)
    if not done:
        os.waitpid(pid, 0)
        return "hung", ""
    # What ends otherwise, by a signal or where a conftest is imported, was noticed.
    return OUTCOMES.get(os.waitstatus_to_exitcode(status), "noticed"), first.read_text()


OUTCOMES = {0: "survived", 5: "survived"}
"""By pytest's exit status."""


def in_fork(tree: Path, tests: Sequence[str], log: Path, first: Path) -> None:
    """Leads a group of processes, and never returns."""
    status = 1
    try:
        os.setsid()
        with open(log, "w") as file:
            for number in (1, 2):
                os.dup2(file.fileno(), number)
        sys.stdout, sys.stderr = (open(number, "w", buffering=1) for number in (1, 2))
        first = first.resolve()
        os.chdir(tree)
        for name in list(sys.modules):
            if name.split(".")[0] in (*FOLDERS, "tests"):
                del sys.modules[name]
        sys.path[:] = [str(tree), *(p for p in sys.path if p and Path(p).resolve() != ROOT)]
        os.environ["PYTHONPATH"] = str(tree)
        sys.dont_write_bytecode = True
        import pytest

        options = ("-x", "-q", "-p", "no:cacheprovider", "-m", SHORT)
        status = pytest.main([*options, *tests], [FirstFailure(first)])
    finally:
        sys.stdout.flush()
        os._exit(int(status))


class FirstFailure:
    """A plugin of pytest that writes down the first test or file that failed."""

    def __init__(self, path: Path):
        self.path = path

    def pytest_runtest_logreport(self, report) -> None:
        if report.failed and not self.path.read_text():
            self.path.write_text(report.nodeid)

    pytest_collectreport = pytest_runtest_logreport


def copied(tree: Path) -> Path:
    """A copy of all that git has or would take."""
    shutil.rmtree(tree, ignore_errors=True)
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    for path in filter(None, listed.stdout.split("\0")):
        if (ROOT / path).exists():
            (tree / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / path, tree / path)
    return tree


# The report


def written(drawn: list[Mistake], outcomes: Outcomes) -> str:
    """The score, and the survivors with their lines."""
    equivalent = {
        (entry["path"], entry["was"], entry["is"]): entry["why"]
        for entry in json.loads(EQUIVALENT.read_text())
    }
    counts = {"run": 0, "equivalent": 0, "noticed": 0}
    survivors = []
    for mistake in drawn:
        outcome = outcomes.of(mistake)
        if outcome is None:
            continue
        counts["run"] += 1
        if outcome in ("noticed", "hung"):
            counts["noticed"] += 1
        elif tuple(known(mistake).values()) in equivalent:
            counts["equivalent"] += 1
        else:
            survivors.append(mistake.diff((ROOT / mistake.path).read_bytes()))
    judged = counts["run"] - counts["equivalent"]
    score = f"{100 * counts['noticed'] / judged:.0f}%" if judged else "none"
    lines = [
        f"{counts['run']} of {len(drawn)} mistakes were run, {counts['equivalent']} equivalent;",
        f"of the other {judged} the tests noticed {counts['noticed']}: {score}.",
    ]
    return "\n".join([*lines, *(f"\n```diff\n{diff}\n```" for diff in survivors)])


if __name__ == "__main__":
    sys.exit(main())
