"""Mask arrays from every annotation format met: COCO segmentations, ReasonSeg polygons, label maps; EXIF frames.

Masks are uint8 (H, W), {0, 1}, 255 = ignored where a format knows such pixels.
"""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TypeVar

import numpy as np
from PIL import Image
from pycocotools import mask as coco

from self1e.data.samples import UNREADABLE, SampleError, why_unreadable
from self1e.model.photos import open_picture

# What each EXIF orientation asks of an array, as Pillow's exif_transpose does to the photo.
ORIENT = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.T,
    6: lambda a: a.T[:, ::-1],
    7: lambda a: a[::-1, ::-1].T,
    8: lambda a: a.T[::-1],
}


T = TypeVar("T")
IGNORED = 255  # value of a pixel that no class or score counts
NAMED = 10  # faulty annotations of a photo that one message names
MAX_PIXELS = 2 * 89_478_485  # of a picture, as Pillow allows
MAX_OUTLINE = 4_000_000  # pixels along all polygons of an annotation; the library keeps five points for each
MAX_SHAPES = 1_000  # of a photo of ReasonSeg


def check_size(height: int, width: int) -> None:
    """Raise TypeError unless these are the sides of a picture that Pillow would open."""
    if height < 1 or width < 1 or height * width > MAX_PIXELS:
        raise TypeError(f"height and width are {height} and {width}")


def is_short_part(part: object) -> bool:
    """Whether a polygon's part is no area: fewer than three points, or half a point too many."""
    short = isinstance(part, list) and (len(part) < 6 or len(part) % 2 == 1)
    return short and all(isinstance(number, (int, float)) for number in part)  # type: ignore[attr-defined]


def check_runs(counts: list | str | bytes, height: int, width: int) -> None:
    """Raise ValueError unless the runs of an RLE, compressed or not, fill (height, width) exactly.

    The library decodes without looking: runs that are cut, too long or negative would give pixels that were never
    written, or write outside the mask.
    """
    if isinstance(counts, (str, bytes)):
        runs = _decompress(counts.encode() if isinstance(counts, str) else counts)
    else:
        runs = np.asarray(counts)
        if runs.dtype.kind not in "iu" or runs.ndim != 1 or any(isinstance(run, bool) for run in counts):
            raise ValueError("the runs are no integers")
    if (runs < 0).any() or (runs > height * width).any() or int(runs.sum()) != height * width:
        raise ValueError("the runs do not add up to the image")


def _decompress(counts: bytes) -> np.ndarray:
    """Runs, int64 (n,), of COCO's compressed RLE.

    A number is a series of characters from 48 on: 5 bits each, lowest first; bit 32 says that another one follows, bit
    16 of the last is the sign. From the fourth number on, the number before the previous one is added.
    """
    digits = np.frombuffer(counts, np.uint8).astype(np.int64) - 48
    if not len(digits) or digits.min() < 0 or digits.max() > 63:
        raise ValueError("its counts are no compressed RLE")
    last = (digits & 32) == 0
    stops = np.flatnonzero(last) + 1
    starts = np.concatenate([[0], stops[:-1]]).astype(np.int64)
    if not last[-1] or (stops - starts).max() > 6:  # 30 bits hold every picture
        raise ValueError("its counts are cut or no compressed RLE")
    place = np.arange(len(digits)) - np.repeat(starts, stops - starts)
    numbers = np.add.reduceat((digits & 31) << 5 * place, starts)
    negative = (digits[stops - 1] & 16) > 0
    numbers = numbers - (negative.astype(np.int64) << 5 * (stops - starts))
    numbers[1::2] = np.cumsum(numbers[1::2])
    numbers[2::2] = np.cumsum(numbers[2::2])
    return numbers


def _rle(segmentation: dict, height: int, width: int) -> dict:
    """Compressed RLE of a compressed or uncompressed one."""
    if list(segmentation["size"]) != [height, width]:
        raise ValueError(f"its size is {segmentation['size']!r:.80}, the image's is {[height, width]}")
    counts = segmentation["counts"]
    check_runs(counts, height, width)
    if isinstance(counts, (str, bytes)):
        return {"size": [height, width], "counts": counts.encode() if isinstance(counts, str) else counts}
    return coco.frPyObjects({"size": [height, width], "counts": list(counts)}, height, width)


def _outline(points: list) -> np.ndarray:
    """One part x0, y0, x1, y1, ... as float64 (n, 2)."""
    array = np.asarray(points)
    # pycocotools takes four numbers for a box and walks without end along a non-finite edge.
    if array.dtype.kind not in "iuf" or array.ndim != 1 or len(array) < 6 or not (np.abs(array) < 1e6).all():
        raise ValueError("a polygon needs at least three finite points")
    return array.astype(np.float64).reshape(-1, 2)


def decode_segmentation(segmentation: list | dict, height: int, width: int) -> np.ndarray:
    """COCO segmentation -> uint8 {0, 1} (height, width), the union of its parts.

    Accepts polygons (one or several parts), compressed RLE (`counts` str or bytes), uncompressed RLE (list), a list of
    RLEs, and an empty list (an empty mask). Among several parts of a polygon those that are no area (`is_short_part`)
    count as empty, as in the published code. Raises ValueError for anything else.
    """
    parts = [segmentation] if isinstance(segmentation, dict) else segmentation
    if not isinstance(parts, list):
        raise ValueError(f"neither polygons nor RLE: {type(parts).__name__}")
    good = [part for part in parts if not is_short_part(part)]
    if parts and not good:
        raise ValueError("a polygon needs at least three finite points")
    mask = np.zeros((height, width), np.uint8)
    length = 0.0
    try:
        for part in good:
            if isinstance(part, dict):
                rle = _rle(part, height, width)
            else:
                points = _outline(part)
                length += np.abs(points - np.roll(points, 1, axis=0)).max(1).sum()
                if length > MAX_OUTLINE:
                    raise ValueError(f"the outlines of its polygons are longer than {MAX_OUTLINE:,} pixels")
                rle = coco.frPyObjects([points.ravel().tolist()], height, width)[0]
            mask |= coco.decode(rle)
    except KeyError as error:
        raise ValueError(f"RLE without {error}") from error
    except (TypeError, OverflowError, RecursionError) as error:
        raise ValueError(str(error)) from error
    return mask


def annotation_mask(annotation: dict, height: int, width: int, id: str) -> np.ndarray:
    """The mask of one COCO annotation. Raises SampleError under `id`, naming the annotation."""
    try:
        return decode_segmentation(annotation["segmentation"], height, width)
    except ValueError as error:
        raise SampleError(id, f"annotation {annotation['id']}: malformed segmentation ({error})") from error


def decode_each(keys: Iterable[T], decode: Callable[[T], np.ndarray], id: str) -> dict[T, np.ndarray]:
    """Key -> mask of several annotations of a photo; `decode` raises SampleError for a faulty one.

    Raises one SampleError under `id` that names all faulty ones, so that they can be mended at once.
    """
    masks, causes = {}, []
    for key in keys:
        try:
            masks[key] = decode(key)
        except SampleError as error:
            causes.append(error.cause)
    if causes:
        more = [f"and {len(causes) - NAMED} more"] if len(causes) > NAMED else []
        raise SampleError(id, "; ".join([*causes[:NAMED], *more]))
    return masks


def paint_shapes(shapes: list[dict], height: int, width: int) -> np.ndarray:
    """ReasonSeg's labelme polygons -> uint8 (height, width): 1 target, 255 ignored.

    Painted from large to small (by painted pixels; the earlier of two equals comes last), points cut to integers, the
    outline of thickness 1 included. A label holding "ignore" gives 255, equal to "flag" is skipped, whatever the case.
    Raises ValueError for shapes that are no polygons.
    """
    if len(shapes) > MAX_SHAPES:
        raise ValueError(f"it has {len(shapes):,} shapes; expected at most {MAX_SHAPES:,}")
    polygons = []
    try:
        for shape in shapes:
            label = shape["label"].lower()
            if label == "flag":
                continue
            points = np.asarray(shape["points"])
            if points.dtype.kind not in "iuf" or points.shape[1:] != (2,) or not (np.abs(points) < 1e6).all():
                raise ValueError("a shape needs finite points (x, y)")
            points = points.astype(np.int32)
            area = int(_paint(np.zeros((height, width), np.uint8), points, 1).sum())
            polygons.append((area, points, IGNORED if "ignore" in label else 1))
    except (KeyError, TypeError, AttributeError, OverflowError) as error:
        raise ValueError(f"shape without {error}") from error
    mask = np.zeros((height, width), np.uint8)
    for _, points, value in sorted(reversed(polygons), key=lambda polygon: -polygon[0]):
        _paint(mask, points, value)
    return mask


def _paint(mask: np.ndarray, points: np.ndarray, value: int) -> np.ndarray:
    import cv2  # reading data is all that needs it, and command lines import this module

    cv2.polylines(mask, [points], isClosed=True, color=value, thickness=1)
    return cv2.fillPoly(mask, [points], color=value)


def encode_mask(mask: np.ndarray) -> dict:
    """bool or {0, 1} (H, W) -> COCO's compressed RLE as JSON holds it, a few hundred bytes."""
    rle = coco.encode(np.asfortranarray(mask, dtype=np.uint8))
    return {"size": list(rle["size"]), "counts": rle["counts"].decode("ascii")}


def load_label_map(path: Path, id: str) -> np.ndarray:
    """One-channel label image -> integers (H, W), as stored. Raises SampleError under `id`."""
    try:
        with open_picture(path) as image:
            if image.format == "JPEG":
                raise SampleError(id, f"{path} is a JPEG, which blurs the labels at every edge; store it as a PNG")
            labels = np.asarray(image)
    except UNREADABLE as error:
        raise SampleError(id, f"cannot read {path}: {why_unreadable(error)}") from error
    if labels.ndim != 2:
        raise SampleError(id, f"{path} has {labels.shape[2]} channels; a mask or label map has one")
    return labels


def orient(mask: np.ndarray, image: Image.Image, orientation: int) -> np.ndarray:
    """Brings an annotation (H, W) into the frame of its photo.

    image:       the photo after its EXIF orientation was applied
    orientation: the tag it had

    Annotation tools differ in whether they saw the turned photo. For quarter turns the shape tells: a mask that lies
    or stands like the turned photo, unlike the stored one, is in place already. All else is in the stored frame.
    """
    height, width = mask.shape
    if orientation >= 5 and np.sign(width - height) == np.sign(image.width - image.height) != 0:
        return mask
    return np.ascontiguousarray(ORIENT[orientation](mask))
