"""What all tests share: a thread for each xdist worker, and the folder of real photos."""

import os
from pathlib import Path

import pytest
import torch


def pytest_configure(config):
    # xdist's processes would each take all cores, and be several times slower for it.
    if hasattr(config, "workerinput"):
        torch.set_num_threads(1)


@pytest.fixture(scope="session")
def sample_data() -> Path:
    """The folder of real photos, `coco/` and `ADEChallengeData2016/` as their users have them."""
    named = os.environ.get("DENSE_SAMPLE_DATA")
    if not named:
        pytest.skip("DENSE_SAMPLE_DATA is not set: no real photos to test on")
    folder = Path(named)
    missing = [name for name in ("coco", "ADEChallengeData2016") if not (folder / name).is_dir()]
    if missing:
        pytest.fail(f"DENSE_SAMPLE_DATA={named} has no {' and no '.join(missing)}/ in it")
    return folder
