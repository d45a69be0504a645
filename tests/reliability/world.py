"""What the reliability runs work on: small data, and a finished run of each training."""

import json
import os
import shutil
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

import numpy as np
from PIL import Image

from dense.recipes import RECIPES
from tests import support
from tests.support import ROOT

CLASSES = ("ground", "box", "bar")
NANO = {
    "detector": RECIPES / "detection/cascade_mask_rcnn_dw_conv_nano.py",
    "segmentor": RECIPES / "segmentation/dw_conv_nano_upernet.py",
    "classifier": RECIPES / "pretraining/dw_conv_nano.py",
}
_NO_WORKERS = (
    *("train_dataloader.num_workers=0", "train_dataloader.persistent_workers=False"),
    *("val_dataloader.num_workers=0", "val_dataloader.persistent_workers=False"),
)


@dataclass(frozen=True)
class World:
    """Paths of the data and of the runs; see :func:`build`."""

    root: Path

    def __getitem__(self, name: str) -> Path:
        return self.root / name

    def words(self, tool: str) -> list[str]:
        """The arguments of a tool after its name; a training is of one iteration, in ``new``."""
        at = self.root
        if tool == "train_detector":
            return [
                *("--config-file", str(NANO["detector"]), "--output-dir", str(at / "new")),
                *(f"--{s}-{k}={at}/coco/{s}{e}" for s in ("train", "val") for k, e in _COCO),
                *("--num-gpus", "0", "dataloader.train.num_workers=0", "train.max_iter=1"),
                *("dataloader.test.num_workers=0", "dataloader.train.total_batch_size=2"),
            ]
        if tool == "train_segmentor":
            folders = (f"--{s}-{k}={at}/seg/{k}/{s}" for s in ("train", "val") for k in _SEG)
            return [
                *(str(NANO["segmentor"]), "--work-dir", str(at / "new"), *folders),
                *("--classes", ",".join(CLASSES), "--short-side", "64", "--cfg-options"),
                *(*_NO_WORKERS, "train_dataloader.batch_size=2", "train_cfg.max_iters=1"),
            ]
        if tool == "pretrain":
            return [
                *(str(NANO["classifier"]), "--work-dir", str(at / "new")),
                *("--data-root", str(at / "photos"), "--num-classes", "3", "--cfg-options"),
                *(*_NO_WORKERS, "train_dataloader.batch_size=4", "train_cfg.max_epochs=1"),
            ]
        if tool == "test_segmentor":
            run = at / "runs/segmentor"
            return [str(run / NANO["segmentor"].name), str(run / "iter_1.pth")]
        if tool == "predict":
            return [
                *(
                    str(at / "photos/val/n01"),
                    "--checkpoint",
                    str(at / "runs/classifier/epoch_1.pth"),
                ),
                *("--out", str(at / "predicted"), "--device", "cpu"),
            ]
        return [str(at / "runs/classifier/epoch_1.pth"), "--out", str(at / "published")]


_COCO = (("json", ".json"), ("images", ""))
_SEG = ("images", "masks")
TOOLS = (
    *("train_detector", "train_segmentor", "test_segmentor"),
    *("pretrain", "predict", "publish_checkpoint"),
)


def build(root: Path) -> World:
    """Draw the data, and train a detector, a segmentor and a classifier for one iteration each.

    Raises:
        RuntimeError: a training failed.
    """
    world = World(root)
    rng = np.random.default_rng(0)
    for split, count in (("train", 4), ("val", 2)):
        _coco(root / "coco", split, count, rng)
        for number in range(count):
            label = np.zeros((64, 80), np.uint8)
            label[10:40, 5:30], label[45:55] = 1, 2
            pixels = rng.integers(0, 60, (64, 80, 3)) + 90 * (label[..., None] == [0, 1, 2])
            _save(root / f"seg/images/{split}/{number}.png", pixels)
            _save(root / f"seg/masks/{split}/{number}.png", label)
            for place, name in enumerate(("n01", "n02", "n03")):
                pixels = rng.integers(0, 80, (40, 48, 3))
                pixels[..., place] += 150
                _save(root / f"photos/{split}/{name}/{number}.jpg", pixels)
    for kind, tool in _TRAINED.items():
        status, said = run_tool(tool, world.words(tool))
        if status:
            raise RuntimeError(f"{tool} failed on good data:\n{said}")
        (root / "runs").mkdir(exist_ok=True)
        os.replace(root / "new", root / "runs" / kind)
    return world


_TRAINED = {"detector": "train_detector", "segmentor": "train_segmentor", "classifier": "pretrain"}


def _coco(root: Path, split: str, count: int, rng: np.random.Generator) -> None:
    images, annotations = [], []
    for number in range(count):
        pixels = np.full((96, 128, 3), 120)
        for category, (w, h) in ((9, (60, 20)), (4, (30, 40))):
            x, y = int(rng.integers(0, 128 - w)), int(rng.integers(0, 96 - h))
            pixels[y : y + h, x : x + w] = 20 * category
            annotations.append(
                dict(
                    id=len(annotations) + 1,
                    image_id=number,
                    category_id=category,
                    bbox=[x, y, w, h],
                    area=w * h,
                    iscrowd=0,
                    segmentation=[[x, y, x + w, y, x + w, y + h, x, y + h]],
                )
            )
        _save(root / split / f"{number}.png", pixels)
        images.append(dict(id=number, file_name=f"{number}.png", height=96, width=128))
    categories = [dict(id=9, name="bar"), dict(id=4, name="block")]
    content = dict(images=images, annotations=annotations, categories=categories)
    (root / f"{split}.json").write_text(json.dumps(content))


def _save(path: Path, pixels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(path)


def copy_of(world: World, root: Path) -> World:
    """A copy to spoil."""
    shutil.copytree(world.root, root, symlinks=True)
    return World(root)


def contents(folder: Path) -> dict[str, str]:
    """A digest of every file below a folder, locks left out."""
    return {
        str(path.relative_to(folder)): sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != ".lock"
    }


def run_tool(
    tool: str, words: list[str], cwd: Path = ROOT, limit: float = 300
) -> tuple[int | None, str]:
    """Run a tool in a process of its own.

    Returns:
        Exit status, negative for a signal and None after ``limit`` seconds, and what it printed.
    """
    done = support.run_tool(tool, *words, cwd=cwd, limit=limit)
    return done.returncode, done.stdout + done.stderr
