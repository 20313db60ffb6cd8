"""Photos in one mode and at one size, without torch: what reads data needs no more."""

from functools import cache
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageOps

# What photos and masks come in. Pillow opens more, and would start Ghostscript for a file that turns out to be EPS.
FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "AVIF", "BMP", "GIF", "TIFF", "PPM", "JPEG2000")

MAX_SIDE = 65_535  # pixels, as in JPEG: to shrink a long side, Pillow takes 32 bytes for each of its pixels


@cache
def _readable() -> tuple[str, ...]:
    """Those of `FORMATS` that the installed Pillow knows."""
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def open_picture(source: Path | str | BinaryIO) -> Image.Image:
    """A file that may come from a stranger, opened and not decoded yet, whatever its name says.

    Raises OSError when it is none of `FORMATS`, or longer than `MAX_SIDE`; decoding may raise more
    (`data.samples.UNREADABLE`).
    """
    picture = Image.open(source, formats=_readable())
    if max(picture.size) > MAX_SIDE:
        picture.close()
        raise OSError(f"it is {picture.width:,} x {picture.height:,} pixels, and no side may be over {MAX_SIDE:,}")
    return picture


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
