"""Small folders of images, and the tool in this process."""

import itertools
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dense.recipes import RECIPES
from tests.support import load_tool, plain_config_text  # noqa: F401

collect_ignore_glob = [] if find_spec("mmengine") else ["test_*.py"]
CONFIGS = RECIPES / "pretraining"
_RUNS = itertools.count()
CLASSES = ("n01", "n02", "n03")


def write_images(folder: Path, counts: dict[str, int], seed: int = 0) -> Path:
    """Noise around a colour of the class's own."""
    rng = np.random.default_rng(seed)
    for number, (name, count) in enumerate(counts.items()):
        (folder / name).mkdir(parents=True)
        for i in range(count):
            pixels = rng.integers(0, 80, (40, 48, 3))
            pixels[..., number % 3] += 150
            Image.fromarray(pixels.astype(np.uint8)).save(folder / name / f"{name}_{i}.jpg")
    return folder


@pytest.fixture(scope="session")
def photos(tmp_path_factory) -> Path:
    """``train`` and ``val``, three classes."""
    root = tmp_path_factory.mktemp("photos")
    write_images(root / "train", dict.fromkeys(CLASSES, 8))
    write_images(root / "val", dict.fromkeys(CLASSES, 4), seed=1)
    return root


@pytest.fixture(scope="session")
def pretrain():
    """``tools/pretrain.py``."""
    return load_tool("pretrain")


@pytest.fixture
def run(pretrain, photos, tmp_path):
    """A function: the tool on the small photos, an epoch of a few iterations, in this process."""

    def call(*args, config="dw_conv_nano", options=(), work_dir=tmp_path / "work", data=True):
        argv = [str(CONFIGS / f"{config}.py"), "--work-dir", str(work_dir)]
        argv += ["--data-root", str(photos), "--num-classes", "3"] if data else []
        argv += [str(arg) for arg in args]
        argv += ["--cfg-options", "train_cfg.max_epochs=2", "train_dataloader.num_workers=0"]
        argv += ["train_dataloader.persistent_workers=False", "val_dataloader.num_workers=0"]
        argv += ["val_dataloader.persistent_workers=False", "val_dataloader.batch_size=4"]
        argv += ["total_batch_size=8"]
        argv += ["train_dataloader.batch_size=8", *options]
        # Runs that start in one second would share a log.
        argv.append(f"experiment_name=run{next(_RUNS)}")
        pretrain.main(argv)
        return work_dir

    return call
