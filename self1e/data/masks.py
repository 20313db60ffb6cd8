"""Mask arrays from every annotation format met: COCO segmentations, ReasonSeg polygons, label maps; EXIF frames.

Masks are uint8 (H, W), {0, 1}, 255 = ignored where a format knows such pixels.
"""

from pathlib import Path

import cv2
import numpy as np
from PIL import Image
from pycocotools import mask as coco

from self1e.data.sample import UNREADABLE, SampleError

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


def _rle(segmentation: dict, height: int, width: int) -> dict:
    """Compressed RLE of a compressed or uncompressed one."""
    if list(segmentation["size"]) != [height, width]:
        raise ValueError(f"its size is {segmentation['size']}, the image's is {[height, width]}")
    counts = segmentation["counts"]
    if isinstance(counts, (str, bytes)):
        return {"size": [height, width], "counts": counts.encode() if isinstance(counts, str) else counts}
    runs = np.asarray(counts)
    if runs.dtype.kind not in "iu" or runs.ndim != 1 or (runs < 0).any() or runs.sum() != height * width:
        raise ValueError("the runs do not add up to the image")
    return coco.frPyObjects({"size": [height, width], "counts": runs.tolist()}, height, width)


def _polygon(points: list, height: int, width: int) -> dict:
    """Compressed RLE of one part x0, y0, x1, y1, ..."""
    array = np.asarray(points, np.float64)
    # pycocotools takes four numbers for a box and walks without end along a non-finite edge.
    if array.ndim != 1 or len(array) < 6 or len(array) % 2 or not (np.abs(array) < 1e6).all():
        raise ValueError("a polygon needs at least three finite points")
    return coco.frPyObjects([array.tolist()], height, width)[0]


def decode_segmentation(segmentation: list | dict, height: int, width: int) -> np.ndarray:
    """COCO segmentation -> uint8 {0, 1} (height, width), the union of its parts.

    Accepts polygons (one or several parts), compressed RLE (`counts` str or bytes), uncompressed RLE (list), a list of
    RLEs, and an empty list (an empty mask). Raises ValueError for anything else.
    """
    parts = [segmentation] if isinstance(segmentation, dict) else segmentation
    if not isinstance(parts, list):
        raise ValueError(f"neither polygons nor RLE: {type(parts).__name__}")
    mask = np.zeros((height, width), np.uint8)
    try:
        for part in parts:
            rle = _rle(part, height, width) if isinstance(part, dict) else _polygon(part, height, width)
            mask |= coco.decode(rle)
    except KeyError as error:
        raise ValueError(f"RLE without {error}") from error
    except (TypeError, OverflowError) as error:
        raise ValueError(str(error)) from error
    return mask


def annotation_mask(annotation: dict, height: int, width: int, id: str) -> np.ndarray:
    """The mask of one COCO annotation. Raises SampleError under `id`, naming the annotation."""
    try:
        return decode_segmentation(annotation["segmentation"], height, width)
    except ValueError as error:
        raise SampleError(id, f"annotation {annotation['id']}: malformed segmentation ({error})") from error


def paint_shapes(shapes: list[dict], height: int, width: int) -> np.ndarray:
    """ReasonSeg's labelme polygons -> uint8 (height, width): 1 target, 255 ignored.

    Painted from large to small (by painted pixels; the earlier of two equals comes last), points cut to integers, the
    outline of thickness 1 included. A label holding "ignore" gives 255, equal to "flag" is skipped, whatever the case.
    Raises ValueError for shapes that are no polygons.
    """
    polygons = []
    try:
        for shape in shapes:
            label = shape["label"].lower()
            if label == "flag":
                continue
            points = np.asarray(shape["points"], np.float64)
            if points.ndim != 2 or points.shape[1] != 2 or not (np.abs(points) < 1e6).all():
                raise ValueError("a shape needs finite points (x, y)")
            points = points.astype(np.int32)
            area = int(_paint(np.zeros((height, width), np.uint8), points, 1).sum())
            polygons.append((area, points, 255 if "ignore" in label else 1))
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"shape without {error}") from error
    mask = np.zeros((height, width), np.uint8)
    for _, points, value in sorted(reversed(polygons), key=lambda polygon: -polygon[0]):
        _paint(mask, points, value)
    return mask


def _paint(mask: np.ndarray, points: np.ndarray, value: int) -> np.ndarray:
    cv2.polylines(mask, [points], isClosed=True, color=value, thickness=1)
    return cv2.fillPoly(mask, [points], color=value)


def load_label_map(path: Path, id: str) -> np.ndarray:
    """One-channel label image -> integers (H, W), as stored. Raises SampleError under `id`."""
    try:
        with Image.open(path) as image:
            labels = np.asarray(image)
    except UNREADABLE as error:
        raise SampleError(id, f"cannot read {path}: {error}") from error
    if labels.ndim != 2:
        raise SampleError(id, f"{path} is no label map: it has {labels.shape[2]} channels")
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
