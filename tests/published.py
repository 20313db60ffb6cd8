"""A synthetic tree as its sets are published: archives laid out as the real ones, and official question files."""

import io
import json
import tarfile
import zipfile
from pathlib import Path

import numpy as np
from PIL import Image
from scipy.io import savemat

from self1e.apps.catalogue import File

VOC = "dataset/vlpart/pascal_part/VOCdevkit/VOC2010"
TOP = {"ade20k": "ADEChallengeData2016/", "pascal_part": "VOCdevkit/", "refclef": "refclef/", "refcoco": "refcoco/"}
SHARED = {  # where the synthetic tree keeps photos that several sets share
    "coco_train2014": [
        "dataset/refer_seg/images/mscoco/images/train2014", "data/vqav2/train2014", "data/okvqa/train2014",
    ],
    "coco_val2014": ["data/vqav2/val2014", "data/okvqa/val2014", "data/pope/val2014"],
}  # fmt: skip


def zipped(members: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def tarred(members: dict[str, bytes], mode: str) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as archive:
        for name, content in members.items():
            record = tarfile.TarInfo(name)
            record.size = len(content)
            archive.addfile(record, io.BytesIO(content))
    return buffer.getvalue()


def files_below(places: list[Path], name: str) -> dict[str, bytes]:
    """Contents of a file, or of all files of folders, as members `name` or `name/...`."""
    if places[0].is_file():
        return {name: places[0].read_bytes()}
    return {
        f"{name}/{path.relative_to(place)}": path.read_bytes()
        for place in places
        for path in sorted(place.rglob("*"))
        if path.is_file()
    }


def published(root: Path, set_name: str, file: File) -> bytes:
    """The bytes of a file as it is published."""
    if file.place:
        return (root / file.place).read_bytes()
    members: dict[str, bytes] = {}
    for member, place in file.unpack.items():
        places = [root / each for each in SHARED.get(set_name, [place])]
        members |= files_below(places, TOP.get(set_name, "") + member)
    return tarred(members, "w") if file.name.endswith(".tar") else zipped(members)


def mat_files(root: Path) -> bytes:
    """trainval.tar.gz: for every photo a dog with two ears and a torso; the last photo has no part."""
    members = {}
    names = (root / VOC / "ImageSets/Main/train.txt").read_text().split()
    for name in names:
        whole = np.zeros(Image.open(root / VOC / "JPEGImages" / f"{name}.jpg").size[::-1], np.uint8)
        whole[10:30, 10:30] = 1
        thirds = np.arange(whole.shape[1]) // 12  # columns 10 and 11, 12 to 23, 24 to 29
        parts = [
            {"part_name": part, "mask": (whole * (thirds == k)).astype(np.uint8)}
            for k, part in enumerate(["lear", "rear", "torso"])
        ]
        thing = {"class": "dog", "class_ind": 12.0, "mask": whole, "parts": parts if name != names[-1] else []}
        buffer = io.BytesIO()
        savemat(buffer, {"anno": {"imname": name, "objects": structs([thing])}})
        members[f"Annotations_Part/{name}.mat"] = buffer.getvalue()
    return tarred(members | {"Annotations_Part/2010_999999.mat": b"of no photo in the list"}, "w:gz")


def structs(values: list[dict]) -> np.ndarray:
    """A MATLAB struct array, 1 x n."""
    fields = list(values[0]) if values else []
    array = np.zeros((1, len(values)), [(field, object) for field in fields])
    for place, value in enumerate(values):
        for field in fields:
            content = value[field]
            array[0, place][field] = structs(content) if isinstance(content, list) else content
    return array if values else np.zeros((0, 0))


def official(root: Path) -> dict[str, bytes]:
    """The files that question files are made from, in the forms in which their authors publish them."""
    data = root / "data"

    def content(name: str) -> dict:
        return json.loads((data / name).read_text())

    found = {"trainval.tar.gz": mat_files(root)}
    for split in "train", "val":
        for kind, place in (
            ("Questions", "v2_OpenEnded_mscoco_{}2014_questions"),
            ("Annotations", "v2_mscoco_{}2014_annotations"),
        ):
            name = f"{place.format(split)}.json"
            found[f"v2_{kind}_{split.title()}_mscoco.zip"] = zipped({name: (data / "vqav2" / name).read_bytes()})
        for place in "OpenEnded_mscoco_{}2014_questions.json", "mscoco_{}2014_annotations.json":
            name = place.format(split)
            found[f"{name}.zip"] = zipped({name: (data / "okvqa" / name).read_bytes()})
        answers = {
            entry["question_id"]: [answer["answer"] for answer in entry["answers"]]
            for entry in content(f"textvqa/textvqa_{split}_annotations.json")["annotations"]
        }
        rows = content(f"textvqa/textvqa_{split}_questions.json")["questions"]
        rows = [row | {"answers": answers[row["question_id"]]} for row in rows]
        found[f"TextVQA_0.5.1_{split}.json"] = json.dumps({"data": rows}).encode()
    rows = [
        {"image": question["image_id"], "question": question["question"], "answers": entry["answers"]}
        for question, entry in zip(
            content("vizwiz/vizwiz_train_questions.json")["questions"],
            content("vizwiz/vizwiz_train_annotations.json")["annotations"],
        )
    ]
    found["Annotations.zip"] = zipped({"train.json": json.dumps(rows).encode(), "val.json": b"[]"})
    names = "train_balanced_questions.json", "testdev_balanced_questions.json"
    found["questions1.2.zip"] = zipped({name: (data / "gqa" / name).read_bytes() for name in names})
    return found
