"""Images as they are meant to be seen, whatever mode they were saved in."""

import os

import numpy as np
from PIL import Image, ImageOps


class UnsetRange(ValueError):
    """Pixels of 32 bits, which say not what is black and what is white."""


class UnreadableImage(ValueError):
    """One image that cannot be used; the others can."""


def to_rgb(image: Image.Image) -> Image.Image:
    """An image turned as its EXIF data says, in RGB.

    Greyscale, palette and CMYK are converted, 16-bit greyscale keeps its upper 8 bits, an alpha
    channel is dropped.

    Args:
        image: opened, of any mode; of an animation its current frame.

    Returns:
        The same picture, mode ``RGB``.

    Raises:
        UnsetRange: 32-bit pixels.
        OSError: it cannot be decoded.
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
    """An image as it is meant to be seen: turned as its EXIF data says, in RGB.

    Greyscale, palette and CMYK are converted, 16-bit greyscale keeps its upper 8 bits, an alpha
    channel is dropped, and an animation gives its first frame.

    Returns:
        ``(H, W, 3)`` uint8.

    Raises:
        UnreadableImage: not an image, or damaged.
    """
    try:
        with Image.open(path) as opened:
            return np.array(to_rgb(opened))
    except UnsetRange as error:
        raise UnreadableImage(f"{path}: {error}") from error
    # A damaged file raises whatever its decoder meets first.
    except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as error:
        raise UnreadableImage(f"{path} cannot be read as an image: {error}") from error


def check_rgb(image: np.ndarray) -> None:
    """Raise a ValueError unless an image is ``(H, W, 3)`` uint8, as every predictor takes it."""
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
        raise ValueError(
            f"an image of shape {image.shape}, {image.dtype}: (H, W, 3), uint8 is needed"
        )
