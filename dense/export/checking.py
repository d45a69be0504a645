"""Exported files beside eager networks, on photos: errors, cosines and latency."""

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import numpy as np
import torch
from PIL import Image

from dense.export.files import ExportError, Runner
from dense.export.sources import Source
from dense.images import UnreadableImage, read_image
from dense.prediction import SUFFIXES

BAR = 1e-3
"""The largest error of a float32 file, relative to the largest value of an output."""
COSINE = 0.99
"""The smallest cosine of an output of a file with smaller numbers."""


@dataclass(frozen=True)
class Comparison:
    """What a file computes, beside eager.

    Attributes:
        sizes: rows and columns of the images that were compared.
        errors: of each output, by name, the largest over all images, relative to its largest value.
        cosines: of each output, by name, the smallest over all images.
        latency: seconds of the file and of eager for an image of the first size, the medians.
    """

    sizes: tuple[tuple[int, int], ...]
    errors: dict[str, float]
    cosines: dict[str, float]
    latency: tuple[float, float]

    @property
    def ratio(self) -> float:
        """The file's latency over eager's."""
        return self.latency[0] / self.latency[1]

    def missed(self, precision: str) -> str | None:
        """Why the file may not be kept, None if it may."""
        if precision == "float32":
            worst = np.max(list(self.errors.values()))
            bar = f"the largest relative error is {worst:.1e}, {BAR:.0e} is allowed"
            return None if worst <= BAR else bar
        worst = np.min(list(self.cosines.values()))
        return None if worst >= COSINE else f"a cosine is {worst:.4f}, {COSINE} is needed"

    def lines(self, engine: str) -> list[str]:
        """The comparison for a terminal."""
        width = max(map(len, self.errors))
        sizes = ", ".join(f"{columns}x{rows}" for rows, columns in self.sizes)
        return [
            f"beside eager, on photos of {sizes}:",
            *(
                f"  {name:{width}}  largest relative error {error:.1e}  "
                f"smallest cosine {self.cosines[name]:.5f}"
                for name, error in self.errors.items()
            ),
            latency_line(engine, self.sizes[0], self.latency),
        ]


def latency_line(engine: str, size: tuple[int, int], latency: tuple[float, float]) -> str:
    """Seconds of a file and of eager, for a terminal."""
    file, eager = (f"{1e3 * seconds:.1f} ms" for seconds in latency)
    return (
        f"  latency at {size[1]}x{size[0]}: {engine} {file}, eager {eager}, "
        f"ratio {latency[0] / latency[1]:.2f} ({torch.get_num_threads()} threads, "
        f"{torch.backends.cpu.get_cpu_capability()})"
    )


def sizes_of(source: Source) -> tuple[tuple[int, int], ...]:
    """Three sizes to compare at: the training's, smaller with odd sides, and larger."""
    rows, columns = source.size
    return (rows, columns), (rows * 5 // 8 | 1, columns * 3 // 4 | 1), (rows, columns * 3 // 2)


def find_photos(folder: str | os.PathLike, count: int) -> list[np.ndarray]:
    """The first readable photos of a folder and those in it, RGB.

    Raises:
        ExportError: it holds none.
    """
    found = []
    for path in sorted(Path(folder).rglob("*")):
        if path.suffix.lower() in SUFFIXES and path.is_file():
            try:
                found.append(read_image(path))
            except UnreadableImage:
                continue
        if len(found) == count:
            return found
    if not found:
        raise ExportError(f"--photos {folder} holds no photo ({', '.join(SUFFIXES)})")
    return found


def normalised(photo: np.ndarray, about: dict, size: tuple[int, int] | None = None) -> np.ndarray:
    """A photo, resized to rows and columns, as ``(1, 3, H, W)`` float32: the input of a file."""
    photo = in_order(photo, about, size).astype(np.float32)
    pixels = (photo - np.float32(about["mean"])) / np.float32(about["std"])
    return np.ascontiguousarray(pixels.transpose(2, 0, 1)[None])


def in_order(photo: np.ndarray, about: dict, size: tuple[int, int] | None = None) -> np.ndarray:
    """A photo, resized to rows and columns, in the channels' order of the network."""
    if size is not None:
        photo = np.asarray(Image.fromarray(photo).resize(size[::-1], Image.Resampling.BILINEAR))
    return photo[..., ::-1] if about["channels"] == "BGR" else photo


def compare(
    source: Source,
    run: Runner | Callable[[np.ndarray], list[np.ndarray]],
    photos: Sequence[np.ndarray],
    repeats: int = 5,
    smallest: bool = True,
) -> Comparison:
    """Run a file and the eager network on photos of three sizes, and of the smallest.

    Args:
        source: the eager network.
        run: the file.
        photos: RGB; each is taken at each size, in a batch of all.
        repeats: of what is timed, after one that is not.
        smallest: also of the smallest size, whose maps of a position or two show mistakes in a
            graph; smaller numbers are calibrated on others.
    """
    names, given = source.about["outputs"], batches(source, photos)
    if smallest:
        least = source.about["sides"][0]
        given |= batches(source, photos, [(least, least)])
    errors, cosines = dict.fromkeys(names, 0.0), dict.fromkeys(names, 1.0)
    for size, batch in given.items():
        for name, ours, true in zip(names, run(batch), eager(source, batch), strict=True):
            if ours.shape != true.shape:
                raise ExportError(f"{name} is {ours.shape} at {size}, eager's is {true.shape}")
            # NumPy's keep a NaN, which Python's max and min drop.
            errors[name] = float(np.maximum(errors[name], _error(ours, true)))
            cosines[name] = float(np.minimum(cosines[name], _cosine(ours, true)))
    image = normalised(photos[0], source.about, source.size)
    latency = tuple(seconds(f, image, repeats) for f in (run, lambda x: eager(source, x)))
    return Comparison(tuple(given), errors, cosines, latency)


def cosines_with(source: Source, photos: Sequence[np.ndarray]) -> Callable[[Path], float]:
    """A function of a file: the smallest cosine of its outputs on photos of three sizes."""
    given = list(batches(source, photos).values())
    expected = [eager(source, batch) for batch in given]

    def smallest(path: Path) -> float:
        run = Runner(path)
        pairs = zip(given, expected, strict=True)
        return float(np.min([[*map(_cosine, run(batch), true)] for batch, true in pairs]))

    return smallest


def batches(
    source: Source,
    photos: Sequence[np.ndarray],
    sizes: Sequence[tuple[int, int]] | None = None,
) -> dict[tuple[int, int], np.ndarray]:
    """The photos as a batch of each size, those of :func:`sizes_of` if none are given."""
    return {
        size: np.concatenate([normalised(photo, source.about, size) for photo in photos])
        for size in sizes or sizes_of(source)
    }


def eager(source: Source, image: np.ndarray) -> list[np.ndarray]:
    """The outputs of the network itself."""
    with torch.inference_mode():
        return [out.numpy() for out in source.network(torch.from_numpy(image))]


def _error(ours: np.ndarray, true: np.ndarray) -> float:
    return float(np.abs(ours.astype(np.float64) - true).max() / np.abs(true).max())


def _cosine(ours: np.ndarray, true: np.ndarray) -> float:
    a, b = (x.astype(np.float64).ravel() for x in (ours, true))
    return float(a @ b / np.sqrt((a @ a) * (b @ b)))


def seconds(function: Callable, image: np.ndarray, repeats: int) -> float:
    """The median of a function's times, after one that does not count."""
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        function(image)
        times.append(time.perf_counter() - start)
    return median(times[1:])
