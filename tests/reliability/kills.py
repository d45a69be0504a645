"""Trainings killed by SIGKILL at random times and resumed end as one that was never killed."""

import random
import shutil
from dataclasses import dataclass
from pathlib import Path

from tests.reliability import trainings
from tests.reliability.world import World, run_tool


@dataclass(frozen=True)
class Outcome:
    """A run that was killed some times: what differs from the one that was not."""

    kills: int
    tensors: int
    metrics: int
    validations: int
    said: str = ""


def run(kind: str, world: World, out: Path, seed: int, most: int = 6) -> Outcome:
    """Train with kills at random times until the training ends, and compare.

    Args:
        kind: a key of :data:`.trainings.TRAININGS`.
        world: the data.
        out: holds ``reference/<kind>`` of an unkilled run, made if missing.
        seed: of the times.
        most: kills of one run.
    """
    training = trainings.TRAININGS[kind]
    reference = trainings.reference(kind, world, out)
    full = float((reference / "seconds").read_text())
    folder = out / "killed" / f"{kind}_{seed}"
    shutil.rmtree(folder, ignore_errors=True)
    rng, kills = random.Random(seed), 0
    while kills < most:
        after = rng.uniform(0.1, 0.8) * full
        status, said = run_tool(training.tool, training.command(world, folder), limit=after)
        if status == 0:
            break
        if status is not None:
            return Outcome(kills, -1, -1, -1, said.strip().splitlines()[-1][:300])
        kills += 1
    else:
        trainings.finish(training, world, folder)
    outcome = Outcome(kills, *trainings.differences(training, reference, folder))
    shutil.rmtree(folder)
    return outcome
