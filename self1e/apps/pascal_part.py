"""Make `vlpart/pascal_part/train.json` from the .mat files of PASCAL-Part.

The annotations come as one MATLAB file per photo (`Annotations_Part/<photo>.mat`), each with a mask for every part of
every object. VLPart writes them as COCO-style JSON and takes the words for positions out of the 193 part names, which
leaves 93. This module follows the same rule with the table below, which leaves 106: which of them VLPart merges or
drops is not known here, so the names, and with them the questions in training, may differ in places. For VLPart's own
file, run its `tools/pascal_part_mat2json.py --split train.txt` and put the result at the same place.

Reading .mat files takes scipy: pip install "self1e[data]".
"""

import io
import re
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from pycocotools import mask as coco_mask
from tqdm import tqdm

from self1e import files
from self1e.apps.unpack import open_archive
from self1e.data.masks import encode_mask

# How a part of any object is called without its position, where dropping the number does not say it already.
# Letters in front: l, r = left, right; f, b = front, back; u, l = upper, lower; in trains h = head, c = coach.
NAMES = {
    "wing": r"[lr]wing", "eye": r"[lr]eye", "ear": r"[lr]ear", "eyebrow": r"[lr]ebrow", "horn": r"[lr]horn",
    "arm": r"[lr][lu]arm", "hand": r"[lr]hand", "leg": r"[lr]([fb]?[lu]?)leg", "foot": r"[lr]foot",
    "paw": r"[lr][fb]pa", "hoof": r"[lr][fb]ho", "wheel": r"[fb]wheel", "mirror": r"(left|right)mirror",
    "license plate": r"[fb]liplate", "side": r"[hc]?(front|left|right|back|roof)side",
}  # fmt: skip


def part_name(raw: str) -> str:
    """The name of a part without its position and number: "lfpa" -> "paw", "door_2" -> "door"."""
    name = re.sub(r"_\d+$", "", raw.strip())
    return next((plain for plain, pattern in NAMES.items() if re.fullmatch(pattern, name)), name)


def convert(archive: Path, image_list: Path, output: Path) -> None:
    """Write COCO-style JSON (compressed RLE, one record per part) of the photos that `image_list` names.

    archive:    the tar.gz with `Annotations_Part/*.mat`
    image_list: VOC2010's `ImageSets/Main/train.txt`, one name per line
    Raises ValueError where a photo has no .mat file, a file is damaged, or scipy is missing.
    """
    names = image_list.read_text(encoding="utf-8").split()
    images: list[dict] = []
    annotations: list[dict] = []
    categories: dict[str, int] = {}
    with open_archive(archive) as members:
        wanted = {f"{name}.mat" for name in names}
        found = [member for member in members if not member.is_noise and member.parts[-1] in wanted]
        missing = wanted - {member.parts[-1] for member in found}
        if missing:
            raise ValueError(f"{archive} lacks {len(missing):,} of the {len(wanted):,} files, such as {min(missing)}")
        for member in tqdm(found, desc="pascal_part/train.json", unit="photo"):
            stem = member.parts[-1].removesuffix(".mat")
            with member.open() as file:
                parts = list(read_parts(file.read(), f"{archive}: {member.name}"))
            if not parts:
                continue
            image_id = int(stem.replace("_", ""))
            height, width = parts[0][1].shape
            images.append({"id": image_id, "file_name": f"{stem}.jpg", "height": height, "width": width})
            for name, mask in parts:
                category = categories.setdefault(name, len(categories) + 1)
                annotations.append(record(len(annotations) + 1, image_id, category, mask))
    if not annotations:
        raise ValueError(f"{archive} holds no part of any photo of {image_list}")
    named = [{"id": id, "name": name, "supercategory": "PART"} for name, id in categories.items()]
    files.write_json(output, {"images": images, "annotations": annotations, "categories": named}, indent=None)


def read_parts(content: bytes, source: str) -> Iterator[tuple[str, np.ndarray]]:
    """("object:part", mask uint8 (H, W)) of every part with at least one pixel. Raises ValueError naming `source`."""
    try:
        from scipy.io import loadmat  # an extra
        from scipy.io.matlab import MatReadError
    except ImportError as error:
        raise ValueError('reading .mat files needs scipy: pip install "self1e[data]"') from error
    try:
        # MATLAB's structs are 1 x n arrays, the fields of each element arrays again.
        objects = loadmat(io.BytesIO(content))["anno"][0, 0]["objects"]
        for thing in objects.flat:
            kind = str(thing["class"].item())
            for part in thing["parts"].flat:
                mask = np.asarray(part["mask"], np.uint8)
                if mask.ndim != 2:
                    raise ValueError(f"a mask has shape {mask.shape}")
                if mask.any():
                    yield f"{kind}:{part_name(str(part['part_name'].item()))}", mask
    except (MatReadError, ValueError, TypeError, LookupError, AttributeError, OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{source} is damaged ({type(error).__name__}: {error})") from error


def record(id: int, image_id: int, category: int, mask: np.ndarray) -> dict:
    """One COCO annotation of a mask uint8 (H, W)."""
    encoded = encode_mask(mask)
    return {
        "id": id,
        "image_id": image_id,
        "category_id": category,
        "segmentation": encoded,
        "area": int(coco_mask.area(encoded)),
        "bbox": coco_mask.toBbox(encoded).tolist(),
        "iscrowd": 0,
    }
