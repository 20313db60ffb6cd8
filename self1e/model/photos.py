"""Photos as users have them, turned into RGB pictures that stand upright."""

from contextlib import suppress
from io import IOBase
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

from self1e.errors import UserError
from self1e.files import check_fetched

Photo = Image.Image | np.ndarray | str | Path | BinaryIO  # an array: uint8, (H, W) or (H, W, 3), RGB

with suppress(ImportError):  # an optional package
    import pillow_heif

    pillow_heif.register_heif_opener()
Image.init()
# What photos and masks come in. Pillow opens more, and would start Ghostscript for a file that turns out to be EPS.
FORMATS = [name for name in "JPEG MPO PNG WEBP AVIF HEIF BMP GIF TIFF PPM JPEG2000".split() if name in Image.OPEN]
UPRIGHT = {  # what each EXIF orientation asks for; 1 and all else: nothing
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def read_picture(source: Path | str | BinaryIO) -> tuple[Image.Image, int]:
    """A picture file, whatever its name says, and the EXIF orientation that it states. Raises UserError."""
    try:
        with Image.open(source, formats=FORMATS) as picture:
            return picture, load(picture)
    except Exception as error:  # Pillow's decoders raise almost anything for a damaged file
        cause = getattr(error, "strerror", None) or str(error) or type(error).__name__
        if isinstance(error, UnidentifiedImageError):
            if isinstance(source, (Path, str)):
                check_fetched(Path(source))
            cause = "it is no picture of a known format (HEIC needs `pip install pillow-heif`), or an empty file"
        raise UserError(f"cannot read {source}: {cause}") from error


def load(image: Image.Image) -> int:
    """Decode the pixels; returns the EXIF orientation that the file states."""
    before = orientation(image) if image.format == "TIFF" else 1  # loading turns it upright and forgets it
    image.load()  # first: what is wrong with the pixels must not pass for metadata that cannot be read
    return max(before, orientation(image))


def photo_of(given: Photo) -> Image.Image:
    """A photo in RGB and upright; of its metadata, `info` holds the EXIF `orientation` alone that it had.

    Greys of 12 or 16 bits are scaled to 8. Raises UserError for deeper ones, which Pillow would clip, and for what is
    no photo or cannot be read.
    """
    if isinstance(given, (str, Path, IOBase)):
        picture, stated = read_picture(given)
        try:
            return upright(picture, stated)
        except UserError as error:
            raise UserError(f"cannot read {given}: {error}") from error
    if isinstance(given, np.ndarray) and given.dtype == np.uint8 and given.shape[2:] in ((), (3,), (4,)):
        given = Image.fromarray(given)
    if not isinstance(given, Image.Image):
        raise UserError(f"a photo is a path, a PIL image or a uint8 array (H, W, 3), not {type(given)}")
    return upright(given, load(given))


def upright(image: Image.Image, stated: int) -> Image.Image:
    """What `photo_of` makes of a picture whose file states an EXIF orientation."""
    stored = orientation(image)
    if image.mode == "F" or image.mode.startswith("I"):
        grey = np.asarray(image)
        if image.mode == "F" or grey.min() < 0 or grey.max() > 0xFFFF:
            raise UserError("its greys have more than 16 bits; save it with 8 or 16 bits per pixel")
        bits = next(bits for bits in (8, 12, 16) if grey.max() < 1 << bits)
        image = Image.fromarray((grey >> bits - 8).astype(np.uint8))
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # the same colours; Pillow warns of the direct way
    image = image.convert("RGB")
    image.info = {"orientation": stated}  # a second call must not turn it again
    return image if stored == 1 else image.transpose(UPRIGHT[stored])


def orientation(image: Image.Image) -> int:
    """The EXIF orientation, 1 to 8; 1 (stored upright) where there is none or the metadata cannot be read."""
    try:
        tag = image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # damaged metadata: the picture may be whole
        return 1
    return tag if tag in UPRIGHT else 1


def resize_bicubic(image: Image.Image, width: int, height: int) -> Image.Image:
    """Pillow's bicubic resize with the order of its two passes, hence its rounding, the same in every release.

    Pillow 13 shrinks rows first where that removes more than twice as many pixels as columns; older ones never do.
    """
    columns, rows = max(0, image.width - width), image.height - height
    first = (image.width, height) if rows > 0 and rows > 2 * columns else (width, image.height)
    return image.resize(first, Image.Resampling.BICUBIC).resize((width, height), Image.Resampling.BICUBIC)
