"""Run the corpus of bad input and the kills, resumable, and write the README's tables.

    python -m tests.reliability                       # about half an hour on one core
    python -m tests.reliability --only predict        # the bad input of a tool
    python -m tests.reliability --kills 50            # kills of each training; 0 leaves them out
    python -m tests.reliability --resume --jobs 2     # go on after a kill of this command

Every outcome is a line of OUT/outcomes.jsonl or OUT/kills.jsonl. Exit status 1 if one went wrong.
"""

import argparse
import os
import sys
from collections import Counter
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict
from multiprocessing import get_context
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

from tqdm import tqdm  # noqa: E402

from dense import files  # noqa: E402
from tests.reliability import corpus, kills, world  # noqa: E402

README = Path(__file__).with_name("README.md")
BEGIN = "<!-- Written by: python -m tests.reliability -->"
END = "<!-- End of what python -m tests.reliability writes. -->"
COLUMNS = ("silent", "traceback", "unsaid", "changed", "executed", "hung")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--out", type=Path, default=Path("work_dirs/reliability"), help="(%(default)s)")
    add("--only", choices=world.TOOLS, help="the cases of one tool")
    add("--case", help="cases whose name holds this text; their output is printed")
    add("--resume", action="store_true", help="keep the good outcomes in OUT")
    add("--jobs", type=int, default=1, help="cases in parallel (%(default)s)")
    add("--kills", type=int, default=50, help="kills of each training, at least (%(default)s)")
    args = parser.parse_args()

    args.out.mkdir(parents=True, exist_ok=True)
    log = args.out / "outcomes.jsonl"
    if not args.resume:
        log.unlink(missing_ok=True)
    done = {}
    if log.exists():
        done = {(entry["tool"], entry["name"]): entry for entry in files.json_lines(log)}
        done = {case: entry for case, entry in done.items() if not entry["faults"]}
    cases = [
        case
        for case in corpus.cases()
        if (not args.only or case.tool == args.only)
        and (not args.case or args.case in case.name)
        and (case.tool, case.name) not in done
    ]
    built = args.out / "world"
    if cases and not (built / "runs/classifier").exists():
        world.build(built)
    with ProcessPoolExecutor(args.jobs, mp_context=get_context("fork")) as pool:
        running = {pool.submit(corpus_run, number, built.resolve()): case
                   for number, case in enumerate_all(cases)}  # fmt: skip
        for finished in tqdm(as_completed(running), "cases", len(running)):
            case, outcome = running[finished], finished.result()
            entry = dict(tool=case.tool, name=case.name, faults=outcome.faults, **asdict(outcome))
            with open(log, "a") as file:
                file.write(files.json_line(entry))
            done[case.tool, case.name] = entry
            if outcome.faults or args.case:
                tqdm.write(f"{case.tool}, {case.name}: {outcome.faults}\n  {outcome.said}")
    wrong = [entry for entry in done.values() if entry["faults"]]
    print(f"{len(wrong)} of {len(done)} cases went wrong; {log}")
    if args.only or args.case:
        return int(bool(wrong))
    killed = run_kills(args, built.resolve())
    write_readme(list(done.values()), killed)
    lost = [
        entry for entry in killed if entry["tensors"] or entry["metrics"] or entry["validations"]
    ]
    print(f"{len(lost)} of {len(killed)} killed trainings ended otherwise")
    return int(bool(wrong or lost))


def run_kills(args: argparse.Namespace, built: Path) -> list[dict]:
    """Kill each training ``--kills`` times at least, in runs of several kills each."""
    log = args.out / "kills.jsonl"
    if not args.resume:
        log.unlink(missing_ok=True)
    done = files.json_lines(log) if log.exists() else []
    out = args.out.resolve() / kills.RUNS
    for kind in kills.TRAININGS:
        entries = [entry for entry in done if entry["training"] == kind]
        with tqdm(total=args.kills, desc=f"kills of the {kind}") as bar:
            bar.update(sum(entry["kills"] for entry in entries))
            while sum(entry["kills"] for entry in entries) < args.kills:
                outcome = kills.run(kind, world.World(built), out, seed=len(entries))
                entry = dict(training=kind, **asdict(outcome))
                with open(log, "a") as file:
                    file.write(files.json_line(entry))
                entries.append(entry)
                done.append(entry)
                bar.update(outcome.kills)
                if outcome.tensors or outcome.metrics or outcome.validations:
                    tqdm.write(f"{kind}: {outcome}")
    return done


def enumerate_all(wanted: list[corpus.Case]) -> list[tuple[int, corpus.Case]]:
    """Cases with their place in the corpus: functions do not travel to other processes."""
    places = {(case.tool, case.name): n for n, case in enumerate(corpus.cases())}
    return [(places[case.tool, case.name], case) for case in wanted]


def corpus_run(number: int, built: Path) -> corpus.Outcome:
    """Run a case by its place in the corpus."""
    return corpus.run(corpus.cases()[number], world.World(built))


def write_readme(entries: list[dict], killed: list[dict]) -> None:
    """Write the tables of outcomes by tool and by training."""
    lines = [f"| tool | cases | {' | '.join(COLUMNS)} |", "| --- |" + " --- |" * (len(COLUMNS) + 1)]
    total: Counter = Counter()
    for tool in world.TOOLS:
        found = [entry for entry in entries if entry["tool"] == tool]
        counts = {column: sum(entry[column] for entry in found) for column in COLUMNS}
        total.update(counts, cases=len(found))
        cells = [f"`{tool}`", str(len(found)), *(str(counts[column]) for column in COLUMNS)]
        lines.append(f"| {' | '.join(cells)} |")
    cells = ["all", str(total["cases"]), *(str(total[column]) for column in COLUMNS)]
    lines.append(f"| {' | '.join(cells)} |")
    head = ("training", "runs", "kills", "differing tensors", "lost metrics", "lost validations")
    lines += ["", f"| {' | '.join(head)} |", "| --- |" + " --- |" * (len(head) - 1)]
    for kind in kills.TRAININGS:
        found = [entry for entry in killed if entry["training"] == kind]
        sums = [
            sum(abs(e[key]) for e in found)
            for key in ("kills", "tensors", "metrics", "validations")
        ]
        lines.append(f"| {' | '.join(map(str, (kind, len(found), *sums)))} |")
    text = README.read_text()
    begin, end = text.index(BEGIN) + len(BEGIN), text.index(END)
    files.write(README, f"{text[:begin]}\n\n" + "\n".join(lines) + f"\n\n{text[end:]}")


if __name__ == "__main__":
    sys.exit(main())
