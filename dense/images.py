"""Images as they are meant to be seen, whatever mode they were saved in."""

import numpy as np
from PIL import Image, ImageOps


class UnsetRange(ValueError):
    """Pixels of 32 bits, which say not what is black and what is white."""


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
