"""Bad input, kills, failing writes and long trainings, resumable; writes the README's tables.

    python -m tests.reliability                       # all, some hours on one core
    python -m tests.reliability --parts corpus        # bad input: about half an hour
    python -m tests.reliability --only predict        # the bad input of one tool
    python -m tests.reliability --resume --jobs 2     # go on after a kill of this command

Every outcome is a line of OUT/<part>.jsonl. Exit status 1 if one went wrong.
"""

import argparse
import os
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

from tqdm import tqdm  # noqa: E402

from dense import files  # noqa: E402
from tests.reliability import corpus, faults, kills, soak, trainings, world  # noqa: E402

README = Path(__file__).with_name("README.md")
BEGIN = "<!-- Written by: python -m tests.reliability --parts {} -->"
END = "<!-- End of {}. -->"
WRONG_INPUT = ("silent", "traceback", "unsaid", "changed", "executed", "hung")
DIFFERENT = ("tensors", "metrics", "validations")


class Log:
    """The outcomes of a part, a line each."""

    def __init__(self, path: Path, keep: bool):
        self.path = path
        if not keep:
            path.unlink(missing_ok=True)
        self.entries = files.json_lines(path) if path.exists() else []

    def add(self, outcome: object, **of: object) -> dict:
        """Write an outcome down, and return its entry."""
        entry = {**of, **asdict(outcome)}
        with open(self.path, "a") as file:
            file.write(files.json_line(entry))
        self.entries.append(entry)
        return entry

    def of(self, **values: object) -> list[dict]:
        """The entries with these values."""
        return [e for e in self.entries if all(e[key] == value for key, value in values.items())]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--out", type=Path, default=Path("work_dirs/reliability"), help="(%(default)s)")
    add("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="(%(default)s)")
    add("--only", choices=world.TOOLS, help="the bad input of one tool; writes no table")
    add("--case", help="bad input whose name holds this text; its output is printed, no table")
    add("--resume", action="store_true", help="keep the good outcomes in OUT")
    add("--jobs", type=int, default=1, help="bad inputs in parallel (%(default)s)")
    add("--kills", type=int, default=50, help="kills of each training, at least (%(default)s)")
    add("--iterations", type=int, default=2000, help="of the long trainings (%(default)s)")
    args = parser.parse_args()

    args.out.mkdir(parents=True, exist_ok=True)
    built = args.out.resolve() / "world"
    if not (built / "runs/classifier").exists():
        world.build(built)
    wrong = 0
    for part in ["corpus"] if args.only or args.case else args.parts:
        log = Log(args.out / f"{part}.jsonl", args.resume)
        wrong += PARTS[part](args, world.World(built), log)
    return int(bool(wrong))


# Bad input


def run_corpus(args: argparse.Namespace, built: world.World, log: Log) -> int:
    """Run the cases that have no good outcome yet; returns how many went wrong."""
    done = {(entry["tool"], entry["name"]): entry for entry in log.entries}
    done = {case: entry for case, entry in done.items() if not _faults(entry)}
    chosen = [
        case
        for case in corpus.cases()
        if (not args.only or case.tool == args.only)
        and (not args.case or args.case in case.name)
        and (case.tool, case.name) not in done
    ]
    # Threads: a case waits for the process of its tool.
    with ThreadPoolExecutor(args.jobs) as pool:
        running = {pool.submit(corpus.run, case, built): case for case in chosen}
        for finished in tqdm(as_completed(running), "cases", len(running)):
            case, outcome = running[finished], finished.result()
            entry = log.add(outcome, tool=case.tool, name=case.name)
            done[case.tool, case.name] = entry
            if _faults(entry) or args.case:
                tqdm.write(f"{case.tool}, {case.name}: {_faults(entry)}\n  {outcome.said}")
    wrong = sum(bool(_faults(entry)) for entry in done.values())
    print(f"{wrong} of {len(done)} cases went wrong; {log.path}")
    if not (args.only or args.case):
        rows = []
        for tool in (*world.TOOLS, None):
            found = [entry for entry in done.values() if tool in (entry["tool"], None)]
            cells = [f"`{tool}`" if tool else "all", len(found)]
            rows.append(
                [*cells, *(sum(entry[column] for entry in found) for column in WRONG_INPUT)]
            )
        write_table("corpus", ("tool", "cases", *WRONG_INPUT), rows)
    return wrong


def _faults(entry: dict) -> list[str]:
    return [name for name in WRONG_INPUT if entry[name]]


# Trainings


def run_kills(args: argparse.Namespace, built: world.World, log: Log) -> int:
    """Kill each training ``--kills`` times at least, in runs of several kills each."""

    def killed(kind: str) -> int:
        return sum(entry["kills"] for entry in log.of(training=kind))

    for kind in trainings.TRAININGS:
        with tqdm(total=args.kills, desc=f"kills of the {kind}") as bar:
            bar.update(killed(kind))
            while killed(kind) < args.kills:
                outcome = kills.run(kind, built, runs_of(args), seed=len(log.of(training=kind)))
                log.add(outcome, training=kind)
                bar.update(outcome.kills)
                if any(getattr(outcome, name) for name in DIFFERENT):
                    tqdm.write(f"{kind}: {outcome}")
    rows = []
    for kind in trainings.TRAININGS:
        found = log.of(training=kind)
        sums = (sum(abs(entry[key]) for entry in found) for key in ("kills", *DIFFERENT))
        rows.append([kind, len(found), *sums])
    write_table("kills", ("training", "runs", "kills", *LOST), rows)
    return sum(sum(row[3:]) for row in rows)


def run_faults(args: argparse.Namespace, built: world.World, log: Log) -> int:
    """Let the n-th write of each training fail, for every n."""
    for kind in trainings.TRAININGS:
        for error in faults.ERRORS:
            with tqdm(desc=f"{error}, {kind}") as bar:
                bar.update(len(log.of(training=kind, error=error)))
                # An entry without a number of its own write says that there are no more.
                while not log.of(training=kind, error=error, number=0):
                    number = len(log.of(training=kind, error=error)) + 1
                    outcome = faults.run(kind, error, number, built, runs_of(args))
                    if outcome is None:
                        outcome, number = faults.Outcome(0, 0, 0, 0, 0, 0), 0
                    log.add(outcome, training=kind, error=error, number=number)
                    bar.update()
                    if any(getattr(outcome, name) for name in FAILED):
                        tqdm.write(f"{kind}, {error}, {number}: {outcome}")
    rows = []
    for kind in trainings.TRAININGS:
        for error in faults.ERRORS:
            found = [e for e in log.of(training=kind, error=error) if e["number"]]
            rows.append([kind, error, len(found), *(sum(e[key] for e in found) for key in FAILED)])
    head = ("training", "error", "failing writes", "silent", "unsaid", "files left", *LOST)
    write_table("faults", head, rows)
    return sum(sum(row[3:]) for row in rows)


def run_soak(args: argparse.Namespace, built: world.World, log: Log) -> int:
    """Train at length."""
    for kind in trainings.TRAININGS:
        if not log.of(training=kind):
            print(f"soak: {kind}, {args.iterations} iterations", flush=True)
            log.add(soak.run(kind, built, runs_of(args), args.iterations), training=kind)
    rows = [
        [
            *(kind, e["iterations"], f"{e['memory']:.0f}"),
            *(f"{e['growth']:+.2f}%", f"{e['late']:+.2f}%", e["files"]),
        ]
        for kind in trainings.TRAININGS
        for e in log.of(training=kind)
    ]
    head = ("training", "iterations", "memory, MB", "its growth", "since half-way")
    head += ("more open files",)
    write_table("soak", head, rows)
    outcomes = [
        soak.Outcome(**{key: e[key] for key in e if key != "training"}) for e in log.entries
    ]
    return sum(not outcome.good for outcome in outcomes)


LOST = ("differing tensors", "lost metrics", "lost validations")
FAILED = ("silent", "unsaid", "left", *DIFFERENT)
PARTS: dict[str, Callable[[argparse.Namespace, world.World, Log], int]] = {
    "corpus": run_corpus,
    "kills": run_kills,
    "faults": run_faults,
    "soak": run_soak,
}


def runs_of(args: argparse.Namespace) -> Path:
    """Where the trainings run."""
    return args.out.resolve() / "trained"


def write_table(part: str, head: tuple[str, ...], rows: list[list]) -> None:
    """Write a part's table into the README."""
    lines = [head, ["---"] * len(head), *rows]
    table = "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)
    begin, end = BEGIN.format(part), END.format(part)
    text = README.read_text()
    before, after = text[: text.index(begin) + len(begin)], text[text.index(end) :]
    files.write(README, f"{before}\n\n{table}\n\n{after}")


if __name__ == "__main__":
    sys.exit(main())
