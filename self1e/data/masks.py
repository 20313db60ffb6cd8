"""Mask arrays from every annotation format met: COCO segmentations, ReasonSeg polygons, label maps; EXIF frames.

Masks are uint8 (H, W), {0, 1}, 255 = ignored where a format knows such pixels.
"""

from pathlib import Path
from typing import BinaryIO

import cv2
import numpy as np
from PIL import Image
from pycocotools import mask as coco

from self1e.errors import UserError
from self1e.model.photos import TURNS, decode

IGNORED = 255  # value of a pixel that no class or score counts
NO_POLYGON = "a polygon is x, y, x, y, ... of at least three finite points, in one list of numbers"


def _rle(part: list | dict, height: int, width: int) -> dict:
    """Compressed RLE of a polygon or an RLE. Raises ValueError unless the runs of an RLE fill the image exactly.

    The library decodes without looking: runs that are cut, too long or negative would give pixels that were never
    written, or write outside the mask.
    """
    if not isinstance(part, dict):
        points = np.asarray(part)
        # pycocotools takes four numbers for a box and walks without end along a non-finite edge.
        if points.dtype.kind not in "iuf" or points.ndim != 1 or len(points) < 6 or not (np.abs(points) < 1e6).all():
            raise ValueError(NO_POLYGON)
        return coco.frPyObjects([points.astype(float).tolist()], height, width)[0]
    size, counts = part.get("size"), part.get("counts", ())
    if size not in ([height, width], (height, width)):
        raise ValueError(f"its size is {size!r:.80}, the image's is {[height, width]}")
    counts = counts.encode() if isinstance(counts, str) else counts
    runs = _decompress(counts) if isinstance(counts, bytes) else np.asarray(counts)
    if runs.dtype.kind not in "iu" or runs.ndim != 1:
        raise ValueError("the runs are no integers")
    if (runs < 0).any() or (runs > height * width).any() or int(runs.sum()) != height * width:
        raise ValueError("the runs do not add up to the image")
    if isinstance(counts, bytes):
        return {"size": [height, width], "counts": counts}
    return coco.frPyObjects({"size": [height, width], "counts": list(counts)}, height, width)


def _decompress(counts: bytes) -> np.ndarray:
    """Runs, int64 (n,), of COCO's compressed RLE.

    A number is a series of characters from 48 on: 5 bits each, lowest first; bit 32 says that another one follows, bit
    16 of the last is the sign. From the fourth number on, the number before the previous one is added.
    """
    runs: list[int] = []
    number = shift = 0
    for digit in counts:
        digit -= 48
        if not 0 <= digit < 64 or shift > 25:  # 30 bits hold every picture
            raise ValueError("its counts are no compressed RLE")
        number |= (digit & 31) << shift
        shift += 5
        if not digit & 32:
            number -= (digit >> 4 & 1) << shift
            runs.append(number + (runs[-2] if len(runs) > 2 else 0))
            number = shift = 0
    if shift or not runs:
        raise ValueError("its counts are cut")
    return np.array(runs)


def _parts(segmentation: list | dict) -> list:
    """Polygons and RLEs of a COCO segmentation, without parts of fewer than three points or half a point too many.

    A flat list of numbers is one polygon. Raises ValueError where there are parts and none is an area.
    """
    parts = segmentation
    if isinstance(segmentation, dict) or segmentation and isinstance(segmentation[0], (int, float)):
        parts = [segmentation]
    good = [part for part in parts if not isinstance(part, list) or (len(part) >= 6 and len(part) % 2 == 0)]
    if parts and not good:
        raise ValueError(NO_POLYGON)
    return good


def decode_segmentation(segmentation: list | dict, height: int, width: int, where: str = "annotation") -> np.ndarray:
    """COCO segmentation -> uint8 {0, 1} (height, width), the union of its parts.

    Accepts polygons (one or several parts, or one flat list), compressed RLE (`counts` str or bytes), uncompressed RLE
    (list), a list of RLEs, and an empty list (an empty mask). Among several parts of a polygon those that are no area
    count as empty, as in the published code. Raises UserError for anything else; `where` names the annotation.
    """
    mask = np.zeros((height, width), np.uint8)
    try:
        if not isinstance(segmentation, (list, dict)):
            raise ValueError(f"neither polygons nor RLE: {type(segmentation).__name__}")
        for part in _parts(segmentation):
            mask |= coco.decode(_rle(part, height, width))
    except ValueError as error:
        raise UserError(f"{where}: malformed segmentation ({error})") from error
    return mask


def contradiction(annotation: dict, height: int, width: int) -> str | None:
    """How a COCO annotation contradicts its own `bbox` and `area` or the image's size, or None.

    Its segmentation may be empty beside a box, far from the box or of another area by more than a factor of four,
    leave the image by more than a rounding error (1% of a side, at least 2 pixels), or be in units of the image's
    size instead of pixels. What is malformed is left to `decode_segmentation`.
    """
    corners, covered = [], 0.0
    try:
        box, area = np.asarray(annotation.get("bbox") or [], float), float(annotation.get("area") or 0)
        boxed = box.shape == (4,) and min(box[2:]) > 0
        for part in _parts(annotation["segmentation"]):
            if isinstance(part, dict):
                rle = _rle(part, height, width)
                x, y, w, h = coco.toBbox(rle)
                corners.append(np.array([[x, y], [x + w, y + h]]))
                covered += float(coco.area(rle))
            else:
                corners.append(np.array(part, np.float32).reshape(-1, 2))
                covered += cv2.contourArea(corners[-1])
    except (ValueError, TypeError):
        return None
    if not covered:
        return "empty segmentation beside a bbox or an area" if boxed or area > 0 else None
    points = np.concatenate(corners)
    (left, top), (right, bottom) = points.min(0), points.max(0)
    slack = max(2, 0.01 * max(height, width))
    if right <= 1 and bottom <= 1 and max(height, width) > 2:
        return "segmentation with coordinates from 0 to 1; they must be pixels"
    if min(left, top) < -slack or right > width + slack or bottom > height + slack:
        return "segmentation that reaches outside its image"
    if boxed:
        x, y, w, h = box
        gaps = np.abs([left - x, right - x - w, top - y, bottom - y - h])
        if gaps.max() > 4 and (gaps / [w, w, h, h]).max() > 0.5:
            return "segmentation far from its bbox"
    if area > 0 and max(area, covered) > 4 * min(area, covered) + 16:
        return "segmentation of another area than it states"
    return None


def encode_mask(mask: np.ndarray) -> dict:
    """bool or {0, 1} (H, W) -> COCO's compressed RLE as JSON holds it, a few hundred bytes."""
    rle = coco.encode(np.asfortranarray(mask, dtype=np.uint8))
    return {"size": list(rle["size"]), "counts": rle["counts"].decode("ascii")}


def paint_shapes(shapes: list[dict], height: int, width: int) -> np.ndarray:
    """ReasonSeg's labelme polygons -> uint8 (height, width): 1 target, 255 ignored.

    Painted from large to small (by painted pixels; the earlier of two equals comes last), points cut to integers, the
    outline of thickness 1 included. A label holding "ignore" gives 255, equal to "flag" is skipped, whatever the case.
    Raises UserError for shapes that are no polygons.
    """
    polygons = []
    for number, shape in enumerate(shapes):
        if not isinstance(shape, dict) or not isinstance(shape.get("label"), str) or "points" not in shape:
            raise UserError(f"shapes[{number}] has no label or no points")
        label = shape["label"].lower()
        if label == "flag":
            continue
        if (kind := shape.get("shape_type", "polygon")) not in ("polygon", None):
            raise UserError(f"shapes[{number}] is a {kind}; draw it as a polygon")
        points = np.asarray(shape["points"])
        if points.dtype.kind not in "iuf" or points.shape[1:] != (2,) or not (np.abs(points) < 1e6).all():
            raise UserError(f"shapes[{number}] needs finite points (x, y)")
        points = points.astype(np.int32)
        area = int(_paint(np.zeros((height, width), np.uint8), points, 1).sum())
        polygons.append((area, points, IGNORED if "ignore" in label else 1))
    mask = np.zeros((height, width), np.uint8)
    for _, points, value in sorted(reversed(polygons), key=lambda polygon: -polygon[0]):
        _paint(mask, points, value)
    return mask


def _paint(mask: np.ndarray, points: np.ndarray, value: int) -> np.ndarray:
    cv2.polylines(mask, [points], isClosed=True, color=value, thickness=1)
    return cv2.fillPoly(mask, [points], color=value)


def load_label_map(source: Path | BinaryIO) -> np.ndarray:
    """One-channel label image -> integers (H, W), as stored. Raises UserError."""
    labels, format = decode(source, lambda picture: (np.asarray(picture), picture.format))
    if format == "JPEG":
        raise UserError(f"{source} is a JPEG, which blurs the labels at every edge; store it as a PNG")
    if labels.ndim != 2:
        raise UserError(f"{source} has {labels.shape[2]} channels; a mask or label map has one")
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
    turn = TURNS.get(orientation)
    return mask if turn is None else np.array(Image.fromarray(mask).transpose(turn))
