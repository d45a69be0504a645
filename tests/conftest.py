"""What all tests share: one thread per process unless told otherwise, and the folder of real photos."""

import os
from pathlib import Path

import pytest
import torch


def pytest_configure(config):
    # Nano networks on small images lose to the threads' own cost, and xdist brings the parallelism.
    if "OMP_NUM_THREADS" not in os.environ and config.option.markexpr != "e2e":
        torch.set_num_threads(1)


@pytest.fixture(scope="session")
def sample_data() -> Path:
    """The folder named by DENSE_SAMPLE_DATA: `coco/` and `ADEChallengeData2016/` as users have them."""
    named = os.environ.get("DENSE_SAMPLE_DATA")
    if not named:
        pytest.skip("DENSE_SAMPLE_DATA is not set: no real photos to test on")
    folder = Path(named)
    missing = [name for name in ("coco", "ADEChallengeData2016") if not (folder / name).is_dir()]
    if missing:
        pytest.fail(f"DENSE_SAMPLE_DATA={named} has no {' and no '.join(missing)}/ in it")
    return folder
