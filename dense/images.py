"""Read images of any mode as RGB, rotated by their EXIF orientation."""

import os

import numpy as np
from PIL import Image, ImageOps


class UnsetRange(ValueError):
    """A 32-bit image: nothing says which values are black and white."""


class UnreadableImage(ValueError):
    """An image that cannot be read or predicted."""


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


def check_rgb(image: np.ndarray) -> None:
    """Raise a ValueError unless an image is ``(H, W, 3)`` uint8, which every predictor expects."""
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
        raise ValueError(
            f"got an image of shape {image.shape}, {image.dtype}: (H, W, 3), uint8 is needed"
        )
