"""Photos in one mode and at one size, without torch: what reads data needs no more."""

import numpy as np
from PIL import Image, ImageOps


def resize_bicubic(image: Image.Image, width: int, height: int) -> Image.Image:
    """Pillow's bicubic resize with the order of its two passes, hence its rounding, the same in every release.

    Pillow 13 shrinks rows first where that removes more than twice as many pixels as columns; older ones never do.
    """
    columns, rows = max(0, image.width - width), image.height - height
    first = (image.width, height) if rows > 0 and rows > 2 * columns else (width, image.height)
    return image.resize(first, Image.Resampling.BICUBIC).resize((width, height), Image.Resampling.BICUBIC)


def as_rgb(image: Image.Image) -> Image.Image:
    """Any mode to RGB, EXIF orientation applied; 16-bit greys keep their upper byte (Pillow alone would clip them)."""
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    return image.convert("RGB")
