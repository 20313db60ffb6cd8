"""Tiny trees in the real formats, for the tests of self1e/data. Photos are 20 x 12, one colour each."""

import json
import pickle
from pathlib import Path

import numpy as np
from PIL import Image

W, H = 20, 12
SQUARE = [2, 3, 8, 3, 8, 9, 2, 9]


def photo(path: Path, shade: int = 100, orientation: int | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    exif = Image.Exif()
    if orientation:
        exif[0x0112] = orientation
    Image.new("RGB", (W, H), (shade, 0, 0)).save(path, exif=exif)
    return path


def label_map(path: Path, values: list[int]) -> None:
    """Columns of equal width, one a value."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.repeat(np.array(values, np.uint8), W // len(values))[None].repeat(H, 0)).save(path)


def write_json(path: Path, value, encoding: str = "utf-8") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(json.dumps(value, ensure_ascii=False).encode(encoding))
    return path


def instances(images: list[tuple[int, str]], annotations: list[dict], categories=("thing",)) -> dict:
    return {
        "images": [{"id": id, "file_name": name, "height": H, "width": W} for id, name in images],
        "annotations": [{"iscrowd": 0, "category_id": 1, **annotation} for annotation in annotations],
        "categories": [{"id": k, "name": name} for k, name in enumerate(categories, 1)],
    }


def reference(ref_id: int, image_id: int, ann_id, split: str, *sentences: str) -> dict:
    sent = [{"sent_id": 100 * ref_id + k, "sent": s, "raw": s, "tokens": s.split()} for k, s in enumerate(sentences)]
    return {"ref_id": ref_id, "image_id": image_id, "ann_id": ann_id, "split": split, "sentences": sent}


def referring_set(root: Path, name: str, references: list[dict], annotations: list[dict], images=None) -> None:
    """A set below `root`/refer_seg, with a photo for each image id met."""
    folder = root / "refer_seg" / name
    ids = sorted({ref["image_id"] for ref in references})
    named = "{0}/images/{0}.jpg" if name == "refclef" else "COCO_train2014_{:012d}.jpg"
    images = images or [(id, named.format(id)) for id in ids]
    photos = root / "refer_seg/images" / ("saiapr_tc-12" if name == "refclef" else "mscoco/images/train2014")
    for _, file_name in images:
        photo(photos / file_name)
    write_json(folder / "instances.json", instances(images, annotations))
    if name == "grefcoco":
        write_json(folder / "grefs(unc).json", references)
    else:
        partition = "umd" if name == "refcocog" else "unc"
        (folder / f"refs({partition}).p").write_bytes(pickle.dumps(references, protocol=2))


def reasoning_photo(
    root: Path, split: str, stem: str, texts: list[str], *, is_sentence=False, shapes=None, encoding="utf-8"
) -> None:
    folder = root / "reason_seg" / "ReasonSeg" / split
    photo(folder / f"{stem}.jpg")
    shapes = [{"label": "target", "points": [[2, 2], [9, 2], [9, 8], [2, 8]]}] if shapes is None else shapes
    write_json(folder / f"{stem}.json", {"text": texts, "is_sentence": is_sentence, "shapes": shapes}, encoding)


def questions(root: Path, file: str, count: int, folder: str = "photos") -> None:
    """`count` question lines about as many photos below `root`/`folder`."""
    lines = []
    for k in range(count):
        photo(root / folder / f"{k}.jpg", shade=k)
        lines.append(json.dumps({"image": f"data/{folder}/{k}.jpg", "question": f"What {k}?", "answer": str(k)}))
    path = root / file
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n")
