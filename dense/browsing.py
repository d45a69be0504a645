"""What a training would see, as a page: augmented photos, classes, sizes, odd and unreadable files.

The trainings' own modules (``dense.detection.browsing`` and its siblings) build the data sets and
transforms of a config and return a :class:`Split` each for training and validation;
:func:`write` makes the page.
"""

import hashlib
import io
import os
import random
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image
from tqdm import tqdm

from dense import files, page
from dense.drawing import Colours
from dense.images import to_rgb

# Lines of a list on the page; the number of all is said.
SHOWN = 20
# Training samples on a page; with half as many of validation it stays below about 4 MB.
MOST_SAMPLES = 80


@dataclass(frozen=True)
class Photo:
    """What a photo's file is.

    Attributes:
        name: what a list calls it.
        digest: of the file's bytes.
        size: width and height as displayed, ``None`` if it cannot be read.
        mode: Pillow's, such as ``"RGB"``.
        turned: whether EXIF turns or mirrors it.
        fault: why it cannot be read, or None.
    """

    name: str
    digest: str = ""
    size: tuple[int, int] | None = None
    mode: str = ""
    turned: bool = False
    fault: str | None = None


@dataclass
class Split:
    """What a page shows of the training or the validation data.

    Attributes:
        name: ``"training"`` or ``"validation"``.
        facts: names and values for the overview.
        frequencies: a table of class, number (a :class:`dense.page.Cell`) and maybe more.
        photos: of the files that were looked at.
        total: number of all images.
        odd: lines about what is odd in the annotations, the most important first.
        histograms: numbers by their name, such as the objects' sizes; drawn one plot each.
        samples: drawn pictures, as training or evaluation gets them.
        about_samples: a sentence about them.
    """

    name: str
    facts: dict[str, object] = field(default_factory=dict)
    frequencies: page.Table | None = None
    photos: list[Photo] = field(default_factory=list)
    total: int = 0
    odd: list[str] = field(default_factory=list)
    histograms: dict[str, list[float]] = field(default_factory=dict)
    samples: list[page.Picture] = field(default_factory=list)
    about_samples: str = ""


def chosen(total: int, count: int, seed: int) -> list[int]:
    """``count`` of the indices below ``total``, drawn by a seed, ascending; all if there are less.

    >>> chosen(100, 3, seed=0)
    [49, 53, 97]
    """
    return sorted(random.Random(seed).sample(range(total), min(count, total)))


def look_at(read: Mapping[str, Callable[[], bytes]], what: str = "reading photos") -> list[Photo]:
    """Read and decode photos in threads, with a progress bar.

    Args:
        read: a function for each name that returns the file's bytes.
        what: for the progress bar.
    """
    with ThreadPoolExecutor(min(8, len(os.sched_getaffinity(0)) + 2)) as pool:
        found = pool.map(lambda entry: _photo(*entry), read.items())
        return list(tqdm(found, what, len(read), delay=2, leave=False, unit="photo"))


def files_of(paths: Sequence[str | os.PathLike]) -> dict[str, Callable[[], bytes]]:
    """For :func:`look_at`: files by their path."""
    return {str(path): Path(path).read_bytes for path in paths}


def _photo(name: str, read: Callable[[], bytes]) -> Photo:
    digest = ""
    # Pillow's decoders raise many kinds of exceptions for a damaged file.
    try:
        content = read()
        digest = hashlib.sha256(content).hexdigest()
        with Image.open(io.BytesIO(content)) as opened:
            mode = opened.mode
            turned = opened.getexif().get(ExifTags.Base.Orientation, 1) != 1
            shown = to_rgb(opened)
    except Exception as error:
        # Pillow names the object in memory.
        reason = " ".join(str(error).split()).partition(" <_io.")[0]
        return Photo(name, digest, fault=reason or type(error).__name__)
    return Photo(name, digest, shown.size, mode, turned)


def oddities(photos: Sequence[Photo]) -> list[str]:
    """Lines about photos that are damaged, double, small, long, grey or turned."""
    lines = []
    for photo in photos:
        if photo.fault:
            lines.append(f"{photo.name} cannot be read: {photo.fault}")
    double = defaultdict(list)
    for photo in photos:
        if photo.digest:
            double[photo.digest].append(photo.name)
    for names in double.values():
        if len(names) > 1:
            lines.append(f"the same photo {len(names)} times: {', '.join(names[:4])}")
    readable = [photo for photo in photos if photo.size]
    for photo in readable:
        width, height = photo.size
        if min(width, height) < 32:
            lines.append(f"{photo.name} is small: {width}x{height}")
        elif max(width, height) > 4 * min(width, height):
            lines.append(f"{photo.name} is long: {width}x{height}")
    modes = Counter(photo.mode for photo in readable if photo.mode != "RGB")
    for mode, count in modes.most_common():
        first = next(photo.name for photo in readable if photo.mode == mode)
        lines.append(f"{count} of mode {mode}, such as {first}: read as RGB")
    if turned := [photo.name for photo in readable if photo.turned]:
        lines.append(f"{len(turned)} are turned by their EXIF orientation, such as {turned[0]}")
    return lines


def shared(training: Sequence[Photo], validation: Sequence[Photo]) -> list[str]:
    """Names of validation photos whose bytes are those of a training photo."""
    known = {photo.digest for photo in training if photo.digest}
    return [photo.name for photo in validation if photo.digest in known]


def sections(splits: Sequence[Split], colours: Colours) -> list[page.Section]:
    """The sections of the page.

    Args:
        splits: training first.
        colours: of the classes, by name; empty for none.
    """
    if len(splits) > 1 and (both := shared(splits[0].photos, splits[1].photos)):
        splits[1].odd.insert(0, f"{len(both)} are training photos too, such as {both[0]}")
    odd: list[page.Block] = []
    samples: list[page.Block] = [page.Legend(colours)] if colours else []
    for split in splits:
        odd += _odd(split)
        if split.samples:
            about = page.Text(f"{split.name.capitalize()}. {split.about_samples}")
            samples += [about, page.Pictures(split.samples)]
    overview = page.Table(["", *(split.name for split in splits)], _facts(splits))
    return [
        page.Section("Overview", [overview]),
        page.Section("Odd and unreadable", odd),
        page.Section("Samples", samples if any(split.samples for split in splits) else []),
        page.Section("Classes", _frequencies(splits)),
        page.Section("Sizes", _sizes(splits)),
    ]


def _odd(split: Split) -> list[page.Block]:
    lines = split.odd + oddities(split.photos)
    many = {0: "nothing is odd", 1: "one thing is odd"}.get(len(lines), f"{len(lines)} are odd")
    said = f"{len(split.photos):,} of {split.total:,} {split.name} photos were decoded: {many}."
    blocks: list[page.Block] = [page.Text(said)]
    if lines:
        more = [f"and {len(lines) - SHOWN} more"] if len(lines) > SHOWN else []
        blocks.append(page.Items([*lines[:SHOWN], *more]))
    return blocks


def _frequencies(splits: Sequence[Split]) -> list[page.Table]:
    """One table of all splits, the most frequent class first."""
    counted = [split for split in splits if split.frequencies]
    if not counted:
        return []
    columns, rows = ["class"], {}
    for split in counted:
        first, *more = split.frequencies.columns[1:]
        columns += [f"{split.name} {first}", *more]
        for name, *cells in split.frequencies.rows:
            rows.setdefault(name, []).extend(cells)
    rows = sorted(rows.items(), key=lambda row: -row[1][0].value)
    return [page.Table(columns, [[name, *cells] for name, cells in rows])]


def write(
    out: str | os.PathLike, title: str, introduction: str, content: Sequence[page.Section]
) -> Path:
    """Write the page; the folder is created."""
    path = Path(out)
    path.parent.mkdir(parents=True, exist_ok=True)
    return files.write(path, page.render(title, introduction, content))


def _facts(splits: Sequence[Split]) -> list[list[object]]:
    names = dict.fromkeys(name for split in splits for name in split.facts)
    return [[name, *(split.facts.get(name) for split in splits)] for name in names]


def _sizes(splits: Sequence[Split]) -> list[page.Block]:
    rows, plots = [], []
    for split in splits:
        sizes = [photo.size for photo in split.photos if photo.size]
        measured = {
            "photo width": [width for width, _ in sizes],
            "photo height": [height for _, height in sizes],
            **split.histograms,
        }
        for name, values in measured.items():
            if values:
                quantiles = np.quantile(values, (0, 0.5, 1))
                shown = [int(v) if v == int(v) else round(float(v), 1) for v in quantiles]
                rows.append([f"{name}, {split.name}", *shown])
    if not rows:
        return []
    by_split = {s.name: [p.size for p in s.photos if p.size] for s in splits}
    sides = {name: [max(size) for size in found] for name, found in by_split.items() if found}
    if sides:
        plots.append((page.histogram(sides, "Photos", "longer side, pixels"), ""))
    for name in dict.fromkeys(name for split in splits for name in split.histograms):
        values = {s.name: s.histograms[name] for s in splits if s.histograms.get(name)}
        if values:
            plots.append((page.histogram(values, name.capitalize(), "pixels"), ""))
    return [page.Table(["pixels", "least", "median", "most"], rows), page.Plots(plots)]
