"""Read images of any mode as RGB, rotated by their EXIF orientation."""

import logging
import os
import zlib

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps

_logger = logging.getLogger(__name__)


class UnsetRange(ValueError):
    """A 32-bit image: nothing says which values are black and white."""


class UnreadableImage(ValueError):
    """An image that cannot be read or predicted."""


class TooManyUnreadable(RuntimeError):
    """More images than a training may skip cannot be read."""

    def __str__(self) -> str:
        # From a worker, the message is a traceback that ends with the reason.
        lines = super().__str__().strip().splitlines()
        return lines[-1].rpartition("TooManyUnreadable: ")[2] if lines else ""


class Skipped:
    """Names the images that cannot be read, and counts them over the workers of a loader.

    Args:
        total: images of the data set.
        share: fraction of them that may be skipped; at least one may.
    """

    def __init__(self, total: int, share: float = 0.001):
        self.total, self.allowed = total, max(1, int(share * total))
        # Shared with the workers; a file counts once, wherever it is met.
        self._seen = torch.zeros(2**16, dtype=torch.bool).share_memory_()

    def note(self, name: object, error: Exception) -> None:
        """Log an image that is skipped.

        Raises:
            TooManyUnreadable: more than the share have been skipped.
        """
        place = zlib.crc32(str(name).encode()) % len(self._seen)
        new = not self._seen[place]
        self._seen[place] = True
        count = int(self._seen.sum())
        if new:
            _logger.warning(
                f"{name} cannot be read ({error}): skipped, {count} so far, {self.allowed} allowed"
            )
        if count > self.allowed:
            raise TooManyUnreadable(
                f"{count} of {self.total} images cannot be read, such as {name}: at most "
                f"{self.allowed} are skipped"
            )


def to_rgb(image: Image.Image) -> Image.Image:
    """Rotate an image by its EXIF orientation and convert it to mode ``RGB``.

    16-bit greyscale keeps its upper 8 bits, an alpha channel is dropped, and an animation gives its
    current frame.

    Raises:
        UnsetRange: 32-bit pixels.
        OSError: the image cannot be decoded.
    """
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    elif image.mode in ("I", "F"):
        raise UnsetRange("32-bit pixels have no set range; save it with 8 or 16 bits")
    elif image.mode in ("P", "PA"):
        image = image.convert("RGBA")
    return image.convert("RGB")


def read_image(path: str | os.PathLike) -> np.ndarray:
    """Read an image file by :func:`to_rgb` as ``(H, W, 3)`` uint8.

    Raises:
        UnreadableImage: the file is not an image, is damaged, or has 32-bit pixels.

    Example:
        >>> read_image("photo.jpg").shape
        (480, 640, 3)
    """
    try:
        with Image.open(path) as opened:
            return np.array(to_rgb(opened))
    except UnsetRange as error:
        raise UnreadableImage(f"{path}: {error}") from error
    # Pillow's decoders raise any of these for a damaged file.
    except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as error:
        raise UnreadableImage(f"{path} cannot be read as an image: {error}") from error


def displayed_size(path: str | os.PathLike) -> tuple[tuple[int, int], tuple[int, int]]:
    """Width and height of an image file, as stored and as displayed by its EXIF orientation.

    The pixels are not decoded.

    Raises:
        UnreadableImage: the file is not an image.
    """
    try:
        with Image.open(path) as opened:
            width, height = opened.size
            turned = opened.getexif().get(ExifTags.Base.Orientation, 1) >= 5
    except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as error:
        raise UnreadableImage(f"{path} cannot be read as an image: {error}") from error
    return (width, height), ((height, width) if turned else (width, height))


def check_rgb(image: np.ndarray) -> None:
    """Raise a ValueError unless an image is ``(H, W, 3)`` uint8, which every predictor expects."""
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
        raise ValueError(
            f"got an image of shape {image.shape}, {image.dtype}: (H, W, 3), uint8 is needed"
        )
