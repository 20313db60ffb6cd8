"""Make vlpart/pascal_part/train.json from the .mat files of PASCAL-Part, as VLPart has it.

Command: python scripts/pascal_part.py trainval.tar.gz dataset/vlpart/pascal_part     (scripts/get_data.sh calls it)
Cost:    10 minutes for the 4,998 photos of VOC2010's train.txt; needs scipy.
Result:  train.json in that folder, in COCO's form: one record per part, 93 categories "object:part".
"""

import argparse
import io
import json
import tarfile
from pathlib import Path

import numpy as np
from pycocotools import mask as coco
from scipy.io import loadmat
from tqdm import tqdm

VEHICLE = "license plate, headlight, door, mirror, window, wheel"
# Object -> its parts, in the order that decides: a part belongs to the first whose word its raw name contains.
PARTS = {
    "aeroplane": "body, wing, tail, wheel",
    "bicycle": "wheel, handlebar, saddle",
    "bird": "beak, head, eye, leg, foot, wing, neck, tail, torso",
    "bottle": "body, cap",
    "bus": VEHICLE,
    "car": VEHICLE,
    "cat": "head, leg, ear, eye, paw, neck, nose, tail, torso",
    "cow": "head, leg, ear, eye, neck, horn, muzzle, tail, torso",
    "dog": "head, leg, ear, eye, paw, neck, nose, muzzle, tail, torso",
    "horse": "head, leg, ear, eye, neck, muzzle, tail, torso",
    "motorbike": "wheel, handlebar, headlight, saddle",
    "person": "hair, head, ear, eye, nose, neck, mouth, arm, hand, leg, foot, torso",
    "potted plant": "plant, pot",
    "sheep": "head, leg, ear, eye, neck, horn, muzzle, tail, torso",
}
NAMES = [f"{thing}:{part}" for thing, parts in PARTS.items() for part in parts.split(", ")]
WORDS = {"license plate": "liplate", "paw": "pa"}  # what the raw names call them: "fliplate", "lfpa"


def category(thing: str, raw: str) -> int | None:
    """The id, 1 to 93, of a part by its object and its raw name ("lfuleg"); None for one that VLPart leaves out."""
    thing = "potted plant" if thing == "pottedplant" else thing
    for part in PARTS.get(thing, "").split(", "):
        if part and WORDS.get(part, part) in raw:
            return NAMES.index(f"{thing}:{part}") + 1
    return None


def read_parts(content: bytes) -> list[tuple[int, np.ndarray]]:
    """(category id, mask uint8 (H, W)) of every listed part in a .mat file, in the file's order."""
    objects = loadmat(io.BytesIO(content))["anno"][0, 0]["objects"]  # MATLAB's structs are 1 x n arrays
    found = [
        (category(str(thing["class"].item()), str(part["part_name"].item())), np.asarray(part["mask"], np.uint8))
        for thing in objects.flat
        for part in thing["parts"].flat
    ]
    return [(id, mask) for id, mask in found if id is not None]


def convert(archive: Path, names: list[str]) -> dict:
    """The COCO-style annotations of the photos called `names`; photos without a listed part are left out."""
    images, annotations = [], []
    with tarfile.open(archive) as tar:
        members = {Path(member.name).stem: member for member in tar.getmembers() if member.name.endswith(".mat")}
        for name in tqdm(names, unit="photo"):
            parts = read_parts(tar.extractfile(members[name]).read())
            image_id = int(name.replace("_", ""))
            for id, mask in parts:
                rle = coco.encode(np.asfortranarray(mask))
                box, area = coco.toBbox(rle).tolist(), int(coco.area(rle))
                record = {"id": len(annotations) + 1, "image_id": image_id, "category_id": id, "iscrowd": 0}
                segmentation = {"size": [int(x) for x in rle["size"]], "counts": rle["counts"].decode("ascii")}
                annotations.append(record | {"segmentation": segmentation, "area": area, "bbox": box})
            if parts:
                height, width = parts[0][1].shape
                images.append({"id": image_id, "file_name": f"{name}.jpg", "height": height, "width": width})
    categories = [{"id": id, "name": name, "supercategory": "PART"} for id, name in enumerate(NAMES, 1)]
    return {"images": images, "annotations": annotations, "categories": categories}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("archive", type=Path, help="trainval.tar.gz, with Annotations_Part/*.mat")
    parser.add_argument("folder", type=Path, help="with VOCdevkit/VOC2010/ImageSets/Main/train.txt")
    args = parser.parse_args()
    names = (args.folder / "VOCdevkit/VOC2010/ImageSets/Main/train.txt").read_text().split()
    (args.folder / "train.json").write_text(json.dumps(convert(args.archive, names)))
