"""Small data and nano configs for the segmentation tests."""

import itertools
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from dense.recipes import RECIPES
from tests.support import load_tool, plain_config_text  # noqa: F401

# Where MMSegmentation is not installed there is nothing here to collect.
collect_ignore_glob = [] if find_spec("mmseg") else ["test_*.py"]

CONFIGS = RECIPES / "segmentation"
_RUNS = itertools.count()
CLASSES = ("ground", "box", "bar")


@pytest.fixture(scope="session")
def shapes(tmp_path_factory):
    """Folders of images with a box and a bar, and of their masks, as a command line names them."""
    root = tmp_path_factory.mktemp("shapes")
    rng = np.random.default_rng(0)
    for split, count in (("train", 6), ("val", 2)):
        for kind in ("images", "masks"):
            (root / kind / split).mkdir(parents=True)
        for i in range(count):
            mask = np.zeros((64, 80), np.uint8)
            mask[8 : 24 + i, 8:40] = 1
            mask[40:48, 10 : 50 + i] = 2
            image = rng.integers(0, 60, (64, 80, 3)) + 90 * mask[..., None]
            Image.fromarray(image.astype(np.uint8)).save(root / f"images/{split}/{i}.jpg")
            Image.fromarray(mask).save(root / f"masks/{split}/{i}.png")
    return dict(
        train_images=str(root / "images/train"),
        train_masks=str(root / "masks/train"),
        val_images=str(root / "images/val"),
        val_masks=str(root / "masks/val"),
        classes=",".join(CLASSES),
    )


@pytest.fixture(scope="session")
def ade_layout(shapes, tmp_path_factory):
    """The shapes in ADE20K's folders."""
    root = tmp_path_factory.mktemp("ade")
    for split, ours in (("training", "train"), ("validation", "val")):
        for kind, theirs in (("images", "images"), ("masks", "annotations")):
            (root / theirs).mkdir(exist_ok=True)
            (root / theirs / split).symlink_to(shapes[f"{ours}_{kind}"])
    return root


@pytest.fixture
def nano_cfg(shapes, tmp_path):
    """A function: the nano config of a family on the shapes, in this process, few iterations."""
    from dense.segmentation.config import load_config, use_own_data

    def make(family="i_d_dw_conv", max_iters=2, **overrides):
        cfg = load_config(CONFIGS / f"{family}_nano_upernet.py")
        use_own_data(cfg, shapes)
        cfg.work_dir = str(tmp_path / "work")
        for loader in (cfg.train_dataloader, cfg.val_dataloader, cfg.test_dataloader):
            loader.update(num_workers=0, persistent_workers=False)
        cfg.train_dataloader.batch_size = 2
        # Same data in the same order, whatever was drawn before.
        cfg.train_dataloader.dataset.pipeline = [
            dict(type="LoadImageFromFile"),
            dict(type="LoadAnnotations"),
            dict(type="Resize", scale=(64, 64), keep_ratio=False),
            dict(type="PackSegInputs"),
        ]
        cfg.model.data_preprocessor.size = (64, 64)
        cfg.randomness = dict(seed=0)
        # MMEngine names a run by the second it began in, and runs of one name share a log.
        cfg.experiment_name = f"run_{next(_RUNS)}"
        cfg.merge_from_dict(
            {
                "train_cfg.max_iters": max_iters,
                "train_cfg.val_interval": 1000,
                "default_hooks.logger.interval": 1,
                "model.decode_head.dropout_ratio": 0.0,
                "model.auxiliary_head.dropout_ratio": 0.0,
                **overrides,
            }
        )
        return cfg

    return make


@pytest.fixture
def ade_slice(sample_data):
    """The root of a real slice of ADE20K."""
    return Path(sample_data) / "ADEChallengeData2016"


@pytest.fixture
def tools():
    """The command lines as modules."""
    return SimpleNamespace(train=load_tool("train_segmentor"), test=load_tool("test_segmentor"))
