"""Files and COCO annotations that every family of sets shares."""

import json
from pathlib import Path

import cv2
import numpy as np
from pycocotools import mask as coco_mask

from self1e.files import write_text
from self1e.synthetic.scenes import CATEGORY, Scene, Shape


def write(path: Path, content: bytes | str | list | dict) -> None:
    """Write bytes or text as they are and anything else as JSON; missing folders are made."""
    if isinstance(content, bytes):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    else:
        write_text(path, content if isinstance(content, str) else json.dumps(content, ensure_ascii=False))


def write_png(path: Path, labels: np.ndarray) -> None:
    write(path, cv2.imencode(".png", labels)[1].tobytes())


def annotation(shape: Shape, ann_id: int, image_id: int, mask: np.ndarray | None = None, **fields) -> dict:
    """A COCO annotation of the shape, or of `mask`, a part of it.

    A shape in full view is a list of polygons (two for a cross); what is partly hidden, has a hole or is a part is an
    RLE, in turns compressed and uncompressed. All of them decode to exactly the drawn pixels.
    """
    rle = shape.rle if mask is None else coco_mask.encode(np.asfortranarray(mask))
    if mask is None and not shape.occluded and shape.kind != "ring":
        segmentation: list | dict = shape.parts
    elif ann_id % 2:
        segmentation = {"size": list(rle["size"]), "counts": rle["counts"].decode()}
    else:
        segmentation = {"size": list(rle["size"]), "counts": run_lengths(coco_mask.decode(rle))}
    return {
        "id": ann_id, "image_id": image_id, "category_id": CATEGORY[shape.kind], "iscrowd": 0,
        "area": int(coco_mask.area(rle)), "bbox": coco_mask.toBbox(rle).tolist(), "segmentation": segmentation,
    } | fields  # fmt: skip


def run_lengths(mask: np.ndarray) -> list[int]:
    """Uncompressed RLE of a mask: column-major run lengths, the first of them of zeros."""
    pixels = np.concatenate([[0], mask.ravel(order="F"), [2]])
    return np.diff(np.flatnonzero(np.diff(pixels)), prepend=0).tolist()


def image_entry(scene: Scene, file_name: str) -> dict:
    return {"id": scene.id, "file_name": file_name, "height": scene.height, "width": scene.width}


def annotation_id(scene: Scene, shape: Shape) -> int:
    return scene.id * 10 + next(i for i, other in enumerate(scene.shapes) if other is shape)


def share(items: list, parts: int) -> list:
    """The first of `parts` equal shares, two items at least."""
    return items[: max(2, len(items) // parts)]
