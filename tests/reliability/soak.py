"""Long trainings of small networks: memory and open files do not grow."""

import json
import os
import shutil
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median

from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook

from dense import files
from tests.reliability import trainings
from tests.reliability.world import World
from tests.support import ROOT, run_forked, run_script

# Steps of an optimizer between two readings, and those before the first one that counts.
EVERY, WARM = 20, 200


@dataclass(frozen=True)
class Outcome:
    """A long training.

    Attributes:
        iterations: steps of the optimizer.
        memory: MB of resident memory, the median of the first 200 steps that count.
        growth: of the last 200 steps' median over it, in percent.
        late: of the same over the 200 steps from the middle on, in percent.
        files: open files more than at first.
        said: the last line of a training that failed.
    """

    iterations: int
    memory: float
    growth: float
    late: float
    files: int
    said: str = ""

    @property
    def good(self) -> bool:
        """Whether it ended, within 2% of the memory and with as many files."""
        return not self.said and self.growth <= 2 and self.files <= 0


def run(kind: str, world: World, out: Path, iterations: int) -> Outcome:
    """Train for some iterations, with a validation and a checkpoint every 100."""
    training = trainings.TRAININGS[kind]
    folder = out / "soak" / kind
    shutil.rmtree(folder, ignore_errors=True)
    log = folder.with_suffix(".jsonl")
    log.unlink(missing_ok=True)
    log.parent.mkdir(parents=True, exist_ok=True)
    tool = ROOT / f"tools/{training.tool}.py"
    words = training.command(world, folder, training.longer(iterations))
    (done,) = run_forked(partial(_measured, log, tool, *words))
    readings = files.json_lines(log)
    shutil.rmtree(folder)
    said = (done.stdout + done.stderr).strip().splitlines()[-1][:300] if done.returncode else ""
    return outcome(readings, said)


def outcome(readings: list[dict], said: str = "") -> Outcome:
    """What the readings of a training say."""
    counting = [reading for reading in readings if reading["step"] >= WARM]
    some, middle = WARM // EVERY, len(counting) // 2
    parts = counting[:some], counting[middle : middle + some], counting[-some:]
    first, half, last = (median(r["memory"] for r in part) for part in parts)
    opened, left = (max(r["files"] for r in part) for part in (parts[0], parts[-1]))
    growth, late = (round(100 * (last / before - 1), 2) for before in (first, half))
    return Outcome(readings[-1]["step"], round(first, 1), growth, late, left - opened, said)


def _measured(log: Path, tool: Path, *words: str) -> None:
    """Run a tool, that writes down its memory and open files as it trains."""
    steps, page = 0, os.sysconf("SC_PAGE_SIZE")

    def measure(optimizer: Optimizer, args: tuple, kwargs: dict) -> None:
        nonlocal steps
        steps += 1
        if steps % EVERY == 0:
            resident = int(Path("/proc/self/statm").read_text().split()[1]) * page / 1e6
            reading = dict(step=steps, memory=resident, files=len(os.listdir("/proc/self/fd")))
            with open(log, "a") as file:
                file.write(json.dumps(reading) + "\n")

    register_optimizer_step_post_hook(measure)
    run_script(tool, *words)
