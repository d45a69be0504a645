"""Two processes, or accumulated gradients, train as one process with the larger batch."""

import json
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from dense.recipes import RECIPES
from tests.pretraining import two_processes
from tests.support import free_port, run_forked

pytestmark = pytest.mark.slow

FAMILIES = ("swin", "i_d_dw_conv")
WAYS = {
    "one": ["--batch-size", "8"],
    "accumulated": ["--batch-size", "4"],
    "two": ["--batch-size", "4", "--launcher", "pytorch"],
}


@pytest.fixture(scope="module")
def trained(photos, tmp_path_factory) -> Path:
    """A folder with ``<family>_<way>``, the work folder of every training."""
    out = tmp_path_factory.mktemp("trained")

    def trainings(*ways):
        for family in FAMILIES:
            for way in ways:
                name = f"{family}_{way}"
                words = [RECIPES / f"pretraining/{family}_nano.py", "--data-root", photos]
                words += ["--num-classes", "3", "--work-dir", out / name, *WAYS[way]]
                yield [*words, *two_processes.options(name)]

    one = list(trainings("one", "accumulated"))
    two, port = list(trainings("two")), free_port()
    ranks = [partial(two_processes.train, two, rank, port) for rank in range(2)]
    for done in (*run_forked(partial(two_processes.train, one)), *run_forked(*ranks)):
        assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    return out


def losses(work: Path) -> np.ndarray:
    """``(processes, iterations)``."""
    return np.array([json.loads(path.read_text()) for path in sorted(work.glob("losses_*.json"))])


def last_top1(work: Path) -> float:
    lines = next(work.glob("*/vis_data/scalars.json")).read_text().splitlines()
    return [json.loads(line)["top1"] for line in lines if "top1" in line][-1]


@pytest.mark.parametrize("family", FAMILIES)
def test_two_processes_train_as_one_with_twice_the_batch(trained, family):
    one, two = trained / f"{family}_one", trained / f"{family}_two"
    assert losses(one).shape == (1, 6) and losses(two).shape == (2, 6)
    # Each process saw images of its own.
    assert not np.allclose(*losses(two))
    np.testing.assert_allclose(losses(two).mean(0), losses(one)[0], rtol=1e-4)
    assert losses(one)[0, -1] < losses(one)[0, 0]
    assert last_top1(two) == pytest.approx(last_top1(one), abs=100 / 12)


@pytest.mark.parametrize("family", FAMILIES)
def test_accumulated_gradients_train_as_the_whole_batch(trained, family):
    one, accumulated = trained / f"{family}_one", trained / f"{family}_accumulated"
    np.testing.assert_allclose(losses(accumulated).reshape(6, 2).mean(1), losses(one)[0], rtol=1e-4)
