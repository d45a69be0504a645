"""Exported detectors beside Detectron2, on photos: detections matched one to one."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from dense.export.checking import in_order, latency_line, normalised, seconds, sizes_of
from dense.export.files import ExportError, Runner
from dense.export.sources import Source

SCORE = 0.3
"""Detections above it are compared; where a photo has none, the best :data:`BEST`."""
BEST = 10
BARS = {"boxes": 0.1, "scores": 1e-3, "masks": 1e-3}
"""The largest errors: of boxes in pixels, of scores, and of the masks' probabilities."""

_UNITS = {"boxes": " pixels"}


class Found(NamedTuple):
    """Detections of an image, best first, as a file has them."""

    boxes: np.ndarray
    scores: np.ndarray
    classes: np.ndarray
    masks: np.ndarray | None = None


@dataclass(frozen=True)
class DetectionComparison:
    """What a file finds, beside Detectron2.

    Attributes:
        sizes: rows and columns of the images that were compared.
        pairs: detections that were compared.
        below: of these, the ones of images without a detection above :data:`SCORE`.
        alone: detections of either side for which the other has none of the class.
        errors: of each output, by name, the largest over all pairs.
        latency: seconds of the file and of eager for an image of the first size, the medians.
    """

    sizes: tuple[tuple[int, int], ...]
    pairs: int
    below: int
    alone: int
    errors: dict[str, float]
    latency: tuple[float, float]

    @property
    def ratio(self) -> float:
        """The file's latency over eager's."""
        return self.latency[0] / self.latency[1]

    def missed(self, precision: str = "float32") -> str | None:
        """Why the file may not be kept, None if it may."""
        if self.alone:
            return f"{self.alone} detections are of the file or of eager alone"
        if not self.pairs:
            return "nothing is found on these photos: name a folder with objects by --photos"
        for name, error in self.errors.items():
            if not error <= BARS[name]:
                bar = f"{BARS[name]:g}{_UNITS.get(name, '')}"
                return f"the largest error of {name} is {error:.1e}, {bar} is allowed"
        return None

    def lines(self, engine: str) -> list[str]:
        """The comparison for a terminal."""
        sizes = ", ".join(f"{columns}x{rows}" for rows, columns in self.sizes)
        below = f", {self.below} of them the best of photos without any" if self.below else ""
        return [
            f"beside eager, on photos of {sizes}:",
            f"  {self.pairs} detections above a score of {SCORE}{below}, matched one to one",
            *(
                f"  {name:6}  largest error {error:.1e}{_UNITS.get(name, '')}"
                for name, error in self.errors.items()
            ),
            latency_line(engine, self.sizes[0], self.latency),
        ]


def compare_detections(
    source: Source,
    run: Runner | Callable[[np.ndarray], list[np.ndarray]],
    photos: Sequence[np.ndarray],
    repeats: int = 3,
) -> DetectionComparison:
    """Run a file and Detectron2's own inference on photos of three sizes, and of the smallest.

    Args:
        source: the eager detector.
        run: the file.
        photos: RGB; each is taken at each size.
        repeats: of what is timed, after one that is not.
    """
    about, least = source.about, source.about["sides"][0]
    sizes = (*sizes_of(source), (least, least))
    pairs = below = alone = 0
    errors = {name: 0.0 for name in about["outputs"] if name in BARS}
    for size in sizes:
        for photo in photos:
            true = eager_detections(source, photo, size)
            ours = Found(*run(normalised(photo, about, size)))
            own_errors, own_pairs, own_alone = differences(ours, true)
            for name in errors:
                errors[name] = float(np.maximum(errors[name], own_errors[name]))
            pairs, alone = pairs + own_pairs, alone + own_alone
            below += 0 if (true.scores > SCORE).any() else own_pairs
    image = normalised(photos[0], about, sizes[0])
    times = (
        seconds(run, image, repeats),
        seconds(lambda photo: eager_detections(source, photo, sizes[0]), photos[0], repeats),
    )
    return DetectionComparison(sizes, pairs, below, alone, errors, times)


def eager_detections(source: Source, photo: np.ndarray, size: tuple[int, int] | None) -> Found:
    """What Detectron2's own inference finds on a photo of rows and columns."""
    pixels = np.ascontiguousarray(in_order(photo, source.about, size).transpose(2, 0, 1))
    with torch.inference_mode():
        inputs = [{"image": torch.from_numpy(pixels)}]
        (found,) = source.network.model.inference(inputs, do_postprocess=False)
    masks = [found.pred_masks[:, 0].numpy()] if found.has("pred_masks") else []
    return Found(
        found.pred_boxes.tensor.numpy(), found.scores.numpy(), found.pred_classes.numpy(), *masks
    )


def differences(ours: Found, true: Found) -> tuple[dict[str, float], int, int]:
    """Match the detections of two, one to one: within a class, the nearest boxes.

    Returns:
        The largest errors by the names of :data:`BARS`, the number of pairs, and the number of
        detections that are without one.
    """
    if (ours.masks is None) != (true.masks is None):
        raise ExportError("one of the file and eager has masks")
    pairs = {}  # of ours, by true
    for index in _compared(true):
        pairs[index] = _nearest(true, index, ours, set(pairs.values()))
    alone = sum(other is None for other in pairs.values())
    pairs = {index: other for index, other in pairs.items() if other is not None}
    for index in _compared(ours) - set(pairs.values()):
        other = _nearest(ours, index, true, set(pairs))
        alone += other is None
        pairs |= {} if other is None else {other: index}
    right, left = list(pairs), list(pairs.values())
    errors = {
        name: _largest(getattr(ours, name)[left], getattr(true, name)[right])
        for name in BARS
        if getattr(true, name) is not None
    }
    return errors, len(pairs), alone


def _compared(found: Found) -> set[int]:
    """The places of the detections above the score, or of the best."""
    return set(range(int((found.scores > SCORE).sum()) or min(BEST, len(found.scores))))


def _nearest(one: Found, index: int, other: Found, taken: set[int]) -> int | None:
    same = np.flatnonzero(other.classes == one.classes[index])
    free = [place for place in same.tolist() if place not in taken]
    distances = np.abs(other.boxes[free] - one.boxes[index]).max(1) if free else []
    return free[int(np.argmin(distances))] if free else None


def _largest(ours: np.ndarray, true: np.ndarray) -> float:
    return float(np.abs(ours - true).max(initial=0.0))
