"""What a pretraining would see, for :mod:`dense.browsing`."""

from collections import Counter
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.config import Config
from mmengine.registry import DATASETS
from timm.data import Mixup
from torch import Tensor
from tqdm import tqdm

from dense import browsing, drawing, page
from dense.browsing import Split
from dense.pretraining.data import ImageStream
from dense.pretraining.predictor import readable
from dense.seeding import seeded
from dense.waiting import waiting


def splits(cfg: Config, images: int, check: int, seed: int) -> tuple[list[Split], drawing.Colours]:
    """Training and validation data of a config; classes of whole photos have no colours.

    Args:
        cfg: as ``tools/pretrain.py`` has it.
        images: how many samples are shown, at most.
        check: how many photos are decoded, at most.
        seed: which ones, and how they are augmented.

    Raises:
        ConfigError: the data is missing, or has another number of classes.
    """
    found = []
    for name, loader in (("training", "train_dataloader"), ("validation", "val_dataloader")):
        with waiting(f"listing the {name} photos"):
            dataset = DATASETS.build(cfg[loader].dataset)
        classes = list(readable(dataset.metainfo["classes"]))
        split = _split(name, dataset, classes, check, seed)
        count = images if name == "training" else images // 2
        with seeded(seed):
            samples = _samples(dataset, count, seed, name)
        mean, std = _normalisation(dataset.transform)
        for pixels, label, photo in samples:
            picture = _rgb(pixels * std + mean)
            caption = f"{classes[label]}: {photo}"
            split.samples.append(page.Picture(picture, caption, caption))
        split.about_samples = (
            "Drawn at random, with the config's augmentation, as the network gets them."
            if name == "training"
            else "Drawn at random, resized and cropped as evaluation gets them."
        )
        if name == "training" and cfg.model.get("mixup") and len(samples) > 1:
            _add_mixed(split, cfg, samples, mean, std, seed)
        found.append(split)
    return found, {}


def _split(name: str, dataset: Any, classes: list[str], check: int, seed: int) -> Split:
    split = Split(name, total=len(dataset))
    split.facts = {"photos": len(dataset), "classes": len(classes)}
    samples = getattr(dataset.reader, "samples", None)
    if samples is None or isinstance(dataset, ImageStream):
        split.odd.append("shards are read in order: classes and files are not counted")
        return split
    counts = Counter(int(sample[1]) for sample in samples)
    most = max(counts.values())
    fewest = min(counts[i] for i in range(len(classes)))
    split.facts |= {"photos of the smallest class": fewest, "photos of the largest class": most}
    split.frequencies = page.Table(
        ["class", "photos"],
        [[c, page.Cell(counts[i], share=counts[i] / most)] for i, c in enumerate(classes)],
    )
    if missing := [c for i, c in enumerate(classes) if not counts[i]]:
        more = f" and {len(missing) - 10} more" if len(missing) > 10 else ""
        split.odd.append(f"no {name} photo is of {', '.join(missing[:10])}{more}")

    def reader(index: int) -> Any:
        def read() -> bytes:
            file, _ = dataset.reader[index]
            with file:
                return file.read()

        return read

    wanted = browsing.chosen(len(dataset), check, seed)
    names = [str(dataset.reader.filename(index)) for index in wanted]
    # Files of one name in two folders are told apart by their index.
    named = {
        f"{name} ({index})" if names.count(name) > 1 else name: reader(index)
        for name, index in zip(names, wanted, strict=True)
    }
    split.photos = browsing.look_at(named, f"reading {name} photos")
    return split


def _samples(dataset: Any, count: int, seed: int, name: str) -> list[tuple[Tensor, int, str]]:
    if isinstance(dataset, ImageStream):
        return [(x, y, f"sample {i}") for i, (x, y, _) in enumerate(islice(dataset, count))]
    wanted = browsing.chosen(len(dataset), count, seed)
    found = []
    for index in tqdm(wanted, f"drawing {name} samples", delay=2, leave=False):
        pixels, label, used = dataset[index]
        found.append((pixels, label, Path(dataset.filename(used)).name))
    return found


def _add_mixed(
    split: Split, cfg: Config, samples: list, mean: Tensor, std: Tensor, seed: int
) -> None:
    """As in a training step: Mixup or CutMix over the samples, the first ones shown."""
    options = {**cfg.model.mixup, "mode": "elem"}
    mix = Mixup(num_classes=cfg.model.num_classes, **options)
    even = len(samples) // 2 * 2
    batch = torch.stack([pixels for pixels, _, _ in samples[:even]])
    with seeded(seed):
        mixed, _ = mix(batch, torch.tensor([label for _, label, _ in samples[:even]]))
    for pixels in mixed[: max(2, even // 3)]:
        split.samples.append(page.Picture(_rgb(pixels * std + mean), "mixed photo", "mixed"))
    split.about_samples += (
        " The last ones are mixed with another by Mixup or CutMix, as the config has it for every "
        "batch."
    )


def _normalisation(transform: Any) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation, ``(3, 1, 1)``, by which timm's transform normalises."""
    for step in getattr(transform, "transforms", [transform]):
        if hasattr(step, "mean") and hasattr(step, "std"):
            return tuple(torch.as_tensor(v).float().view(-1, 1, 1) for v in (step.mean, step.std))
    return torch.zeros(3, 1, 1), torch.ones(3, 1, 1)


def _rgb(pixels: Tensor) -> np.ndarray:
    return (pixels.clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
