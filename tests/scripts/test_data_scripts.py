"""The scripts that bring data: from archives and official files to the trees that training reads."""

import importlib.util
import io
import json
import os
import subprocess
import sys
import tarfile
import zipfile

import numpy as np
import pytest
from helpers import ROOT
from pycocotools import mask as coco
from scipy.io import savemat

GET = ROOT / "scripts" / "get_data.sh"
WGET = """#!/usr/bin/env bash
# Serves what lies in $SERVED instead of the network: wget ... --directory-prefix FOLDER URL
mkdir -p "$5"; cp "$SERVED/${6##*/}" "$5"
"""


def module(name: str):
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


def test_get_data_puts_archives_in_their_places(tmp_path):
    served, tools = tmp_path / "served", tmp_path / "tools"
    served.mkdir()
    tools.mkdir()
    (tools / "wget").write_text(WGET)
    (tools / "wget").chmod(0o755)
    for name, members in {
        "saiapr_tc-12.zip": ["saiapr_tc-12/00/images/25.jpg"],
        "refclef.zip": ["refclef/refs(unc).p", "refclef/refs(berkeley).p", "refclef/instances.json"],
    }.items():
        with zipfile.ZipFile(served / name, "w") as archive:
            for member in members:
                archive.writestr(member, member)
    environment = os.environ | {"PATH": f"{tools}:{os.environ['PATH']}", "SERVED": str(served)}
    environment |= {"DATASET_DIR": str(tmp_path / "dataset"), "DATA_DIR": str(tmp_path / "data")}
    for _ in range(2):  # the second call finds everything there
        subprocess.run(["bash", GET, "refclef"], env=environment, check=True, capture_output=True, timeout=60)
    root = tmp_path / "dataset" / "refer_seg"
    found = {str(path.relative_to(root)) for path in root.rglob("*") if path.is_file()}
    assert found == {"images/saiapr_tc-12/00/images/25.jpg", "refclef/refs(unc).p", "refclef/instances.json"}


def test_get_data_refuses_an_unknown_set():
    done = subprocess.run(["bash", GET, "refcocoo"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and "refcocoo" in done.stderr


@pytest.mark.parametrize(
    "thing, raw, name",
    [
        ("horse", "lfuleg", "horse:leg"),  # a word inside the raw name
        ("person", "rear", "person:ear"),
        ("dog", "lfpa", "dog:paw"),
        ("bus", "fliplate", "bus:license plate"),
        ("pottedplant", "plant", "potted plant:plant"),
        ("cat", "lbho", None),  # no hooves
        ("chair", "leg", None),  # no chairs
    ],
)
def test_pascal_part_names(thing, raw, name):
    script = module("pascal_part")
    assert len(script.NAMES) == 93
    assert script.category(thing, raw) == (None if name is None else script.NAMES.index(name) + 1)


def test_pascal_part_writes_one_record_per_listed_part(tmp_path):
    def part(name: str, rows: slice) -> dict:
        mask = np.zeros((6, 4), np.uint8)
        mask[rows] = 1
        return {"part_name": name, "mask": mask}

    def photo(thing: str, *parts: dict) -> bytes:
        def structs(items: list[dict]) -> np.ndarray:
            array = np.empty((1, len(items)), [(key, object) for key in items[0]] if items else object)
            for index, item in enumerate(items):
                array[0, index] = tuple(item.values())
            return array

        content = io.BytesIO()
        savemat(content, {"anno": {"objects": structs([{"class": thing, "parts": structs(list(parts))}])}})
        return content.getvalue()

    contents = {
        "2008_000008": photo(
            "horse", part("lfuleg", slice(0, 2)), part("lfho", slice(2, 3)), part("head", slice(3, 4))
        ),
        "2008_000009": photo("train", part("head", slice(0, 2))),
    }
    with tarfile.open(tmp_path / "trainval.tar.gz", "w:gz") as archive:
        for name, content in contents.items():
            member = tarfile.TarInfo(f"Annotations_Part/{name}.mat")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    script = module("pascal_part")
    made = script.convert(tmp_path / "trainval.tar.gz", list(contents))
    assert made["images"] == [{"id": 2008000008, "file_name": "2008_000008.jpg", "height": 6, "width": 4}]
    names = [script.NAMES[record["category_id"] - 1] for record in made["annotations"]]
    assert names == ["horse:leg", "horse:head"]
    leg = made["annotations"][0]
    assert coco.decode(leg["segmentation"])[:2].all() and leg["area"] == 8 and leg["bbox"] == [0, 0, 4, 2]


ANSWERS = [{"answer": "two"}, {"answer": "2"}, {"answer": "2"}]
QUESTION = {"image_id": 9, "question": "How many?", "question_id": 7}


@pytest.mark.parametrize(
    "kind, contents, expected",
    [
        ("vqa", [{"questions": [QUESTION]}, {"annotations": [{"question_id": 7, "answers": ANSWERS}]}], 7),
        ("textvqa", [{"data": [QUESTION | {"answers": ["two", "2", "2"]}]}], 7),
        ("vizwiz", [[{"image": 9, "question": "How many?", "answers": ANSWERS}]], 0),
        ("gqa", [{"07": {"imageId": 9, "question": "How many?", "answer": "2"}}], "07"),
    ],
)
def test_questions_are_made_from_the_official_files(tmp_path, kind, contents, expected):
    paths = []
    for number, content in enumerate(contents):
        paths.append(tmp_path / f"{number}.json")
        paths[-1].write_text(json.dumps(content))
    command = [sys.executable, ROOT / "scripts" / "make_questions.py", kind, *paths, "--image", "data/x/{:03d}.jpg"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    record = {"image": "data/x/009.jpg", "question": "How many?", "question_id": expected, "answer": "2"}
    assert [json.loads(line) for line in done.stdout.splitlines()] == [record]
