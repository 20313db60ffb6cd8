"""Mask arrays from what several sets have: COCO segmentations, label maps; EXIF frames.

Masks are uint8 (H, W), {0, 1}, 255 = ignored where a format knows such pixels.
"""

from pathlib import Path
from typing import Any, BinaryIO

import cv2
import numpy as np
from PIL import Image
from pycocotools import mask as coco

from self1e.data.samples import naming
from self1e.errors import UserError
from self1e.model.photos import UPRIGHT, read_picture

IGNORED = 255  # value of a pixel that no class or score counts


def _decompress(counts: bytes) -> list[int]:
    """Runs of COCO's compressed RLE.

    A number is a series of characters from 48 on: 5 bits each, lowest first; bit 32 says that another one follows, bit
    16 of the last is the sign. From the fourth number on, the number before the previous one is added.
    """
    runs: list[int] = []
    number = shift = 0
    for digit in counts:
        digit -= 48
        number |= (digit & 31) << shift
        shift += 5
        if not digit & 32:
            number -= (digit >> 4 & 1) << shift
            runs.append(number + (runs[-2] if len(runs) > 2 else 0))
            number = shift = 0
    return runs


def _decode(rle: dict, height: int, width: int) -> np.ndarray:
    """RLE -> uint8 {0, 1} (height, width). Raises UserError unless the runs fill the image exactly."""
    size, runs = rle.get("size"), rle.get("counts")
    if size not in ([height, width], (height, width)):
        raise UserError(f"its size is {size!r:.80}, the image's is {[height, width]}")
    if isinstance(runs, (str, bytes)):
        runs = _decompress(runs.encode() if isinstance(runs, str) else runs)
    if not isinstance(runs, list) or not all(type(run) is int and run >= 0 for run in runs):
        raise UserError("the runs are no whole numbers from 0 on")
    if sum(runs) != height * width:
        raise UserError("the runs do not add up to the image")
    values = np.arange(len(runs)) % 2  # zeros first, column by column
    return np.repeat(values.astype(np.uint8), runs).reshape(width, height).T


def _are_numbers(values: Any) -> bool:
    return isinstance(values, list) and all(isinstance(x, (int, float)) for x in values)


def _parts(segmentation: list | dict, height: int, width: int) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Polygons, (n, 2), and masks of the RLEs of a COCO segmentation, of which a flat list of numbers is one polygon.

    Among several parts those with fewer than three points or half a point too many cover nothing, as in the published
    code. Raises UserError where no part is an area, and for polygons of anything but finite numbers.
    """
    if not isinstance(segmentation, (list, dict)):
        raise UserError(f"it is {type(segmentation)}")
    flat = isinstance(segmentation, dict) or (segmentation and isinstance(segmentation[0], (int, float)))
    given = [segmentation] if flat else segmentation
    masks = [_decode(part, height, width) for part in given if isinstance(part, dict)]
    lists = [part for part in given if not isinstance(part, dict)]
    sound = all(map(_are_numbers, lists))
    polygons = [np.array(part, float) for part in lists if len(part) >= 6 and len(part) % 2 == 0] if sound else []
    # pycocotools walks without end along an edge that is not finite.
    sound = sound and all((np.abs(each) < 1e6).all() for each in polygons)
    if not sound or (given and not polygons and not masks):
        raise UserError("a polygon is x, y, x, y, ... of at least three finite points, in one list of numbers")
    return [each.reshape(-1, 2) for each in polygons], masks


def decode_segmentation(segmentation: list | dict, height: int, width: int) -> np.ndarray:
    """COCO segmentation -> uint8 {0, 1} (height, width), the union of its parts.

    Accepts polygons (one or several parts, or one flat list), compressed RLE (`counts` str or bytes), uncompressed RLE
    (list), a list of RLEs, and an empty list (an empty mask). Raises UserError for anything else.
    """
    union = np.zeros((height, width), np.uint8)
    with naming("malformed segmentation"):
        polygons, masks = _parts(segmentation, height, width)
    for polygon in polygons:
        masks += [coco.decode(coco.frPyObjects([polygon.ravel().tolist()], height, width)[0])]
    for mask in masks:
        union |= mask
    return union


def contradiction(annotation: dict, height: int, width: int) -> str | None:
    """How a COCO annotation contradicts its own `bbox` and `area` or the image's size, or None.

    Rounding errors (1% of a side, at least 2 pixels) and areas within a factor of four are none. What is malformed is
    left to `decode_segmentation`.
    """
    try:
        polygons, masks = _parts(annotation["segmentation"], height, width)
    except UserError:
        return None
    box, area = annotation.get("bbox", []), annotation.get("area", 0)
    boxed = _are_numbers(box) and len(box) == 4 and min(box[2:]) > 0
    area = area if _are_numbers([area]) else 0
    corners = [polygon.astype(np.float32) for polygon in polygons]
    covered = sum(map(cv2.contourArea, corners)) + sum(float(mask.sum()) for mask in masks)
    for x, y, w, h in map(cv2.boundingRect, masks):
        corners.append(np.array([[x, y], [x + w, y + h]], np.float32))
    if not covered:
        return "empty segmentation beside a bbox or an area" if boxed or area > 0 else None
    points, size, slack = np.concatenate(corners), np.array([width, height]), max(2, 0.01 * max(height, width))
    low, high = points.min(0), points.max(0)
    if high.max() <= 1 and size.max() > 2:
        return "segmentation with coordinates from 0 to 1; they must be pixels"
    if low.min() < -slack or (high > size + slack).any():
        return "segmentation that reaches outside its image"
    if boxed:
        gaps = np.abs([low - box[:2], high - box[:2] - box[2:]])
        if (gaps > np.maximum(2 * slack, 0.5 * np.minimum(box[2:], high - low))).any():
            return "segmentation far from its bbox"
    if area > 0 and max(area, covered) > 4 * min(area, covered) + 16:
        return "segmentation of another area than it states"
    return None


def encode_mask(mask: np.ndarray) -> dict:
    """bool or {0, 1} (H, W) -> COCO's compressed RLE as JSON holds it, a few hundred bytes."""
    rle = coco.encode(np.asfortranarray(mask, dtype=np.uint8))
    return {"size": list(rle["size"]), "counts": rle["counts"].decode("ascii")}


def load_label_map(source: Path | BinaryIO) -> np.ndarray:
    """One-channel label image -> integers (H, W), as stored. Raises UserError."""
    picture, _ = read_picture(source)
    labels = np.asarray(picture)
    if picture.format == "JPEG":
        raise UserError(f"{source} is a JPEG, which blurs the labels at every edge; store it as a PNG")
    if labels.ndim != 2:
        raise UserError(f"{source} has {labels.shape[2]} channels; a mask or label map has one")
    return labels


def orient(mask: np.ndarray, image: Image.Image) -> np.ndarray:
    """Brings an annotation (H, W) into the frame of its photo, of `photo_of`, which says how it was stored.

    Annotation tools differ in whether they saw the turned photo. For quarter turns the shape tells: a mask that lies
    or stands like the turned photo, unlike the stored one, is in place already. All else is in the stored frame.
    """
    orientation, (height, width) = image.info["orientation"], mask.shape
    if orientation >= 5 and np.sign(width - height) == np.sign(image.width - image.height) != 0:
        return mask
    turn = UPRIGHT.get(orientation)
    return mask if turn is None else np.array(Image.fromarray(mask).transpose(turn))
