"""gRefCOCO val with three photos, ReasonSeg val with two or more, in the real formats, and a program for them."""

import os
import subprocess
import sys
from pathlib import Path

from helpers import ROOT, noise
from trees import write_json

GREF, REASON = "grefcoco|unc|val", "ReasonSeg|val"
SENTENCES = {  # photo number -> (sentence, has a target); nine units, so that two ranks cannot share them evenly
    1: [("left square", True), ("Right square", True), ("no such thing", False), ("both", True), ("it", True)],
    2: [("a square with a very long description that needs more tokens than the others", True)],
    3: [("square", True), ("a dog", False), ("top left one", True)],
}
TRAIN2014 = "refer_seg/images/mscoco/images/train2014"
SECOND = "COCO_train2014_000000000002.jpg"  # the last photo of gRefCOCO's schedule
# Arguments: version, dataset, results, rank that is killed at the photo SECOND or "none", splits.
PROGRAM = """
import os, signal, sys
from dataclasses import replace
import torch
from segmentation_trees import SECOND
from self1e import Self1EForSegmentation, Self1EProcessor, distributed
from self1e.data.sets.referring import Referring
from self1e.evaluation.segmentation.run import evaluate_splits
version, dataset, out, rank, *splits = sys.argv[1:]


def read(self, item, getitem=Referring.__getitem__):
    photo = getitem(self, item)
    hit = photo.image_id == SECOND and rank == os.environ.get("RANK", "0")
    return replace(photo, load=lambda: os.kill(os.getpid(), signal.SIGKILL)) if hit else photo


Referring.__getitem__ = read


def program():
    distributed.start("gloo")
    torch.manual_seed(0)
    model = Self1EForSegmentation.from_pretrained(version, dtype=torch.float32)
    torch.nn.init.normal_(model.segmentation_head.f_out[-1].bias)
    processor = Self1EProcessor.from_pretrained(version)
    options = {"workers": 0, "conversations_per_forward": 2, "visualize": True, "weights": {"weights": "tiny"}}
    evaluate_splits(model, processor, splits, dataset_dir=dataset, output_dir=out, **options)
    return 0


sys.exit(distributed.run_program(program))
"""


def make_dataset(root: Path, *, reasoning: int = 2) -> Path:
    """gRefCOCO val with three photos and ReasonSeg val with a number of them, in the formats of the real ones."""
    photos = root / "refer_seg/images/mscoco/images/train2014"
    photos.mkdir(parents=True)
    images, annotations, refs = [], [], []
    for number, sentences in SENTENCES.items():
        width, height, name = 60 + 7 * number, 50 - 3 * number, f"COCO_train2014_{number:012d}.jpg"
        noise(width, height, number).save(photos / name)
        images.append({"id": number, "file_name": name, "width": width, "height": height})
        box = [5.0, 5.0, 30.0, 5.0, 30.0, 25.0, 5.0, 25.0]
        annotations.append({"id": number, "image_id": number, "category_id": 1, "segmentation": [box], "area": 500.0,
                            "iscrowd": 0, "bbox": [5, 5, 25, 20]})  # fmt: skip
        for text, target in sentences:
            key = len(refs)
            sentence = {"sent_id": key, "sent": text, "raw": text, "tokens": text.split()}
            refs.append({"ref_id": key, "image_id": number, "ann_id": [number if target else -1], "split": "val",
                         "sent_ids": [key], "sentences": [sentence], "file_name": name, "no_target": not target,
                         "category_id": [1 if target else -1]})  # fmt: skip
    instances = {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "thing"}]}
    write_json(root / "refer_seg/grefcoco/instances.json", instances)
    write_json(root / "refer_seg/grefcoco/grefs(unc).json", refs)
    for number in range(reasoning):
        text, is_sentence = [("Which one is it?", True), ("the one on the left", False)][number % 2]
        folder = root / "reason_seg/ReasonSeg/val"
        corners = {"target": [[4, 4], [30, 4], [30, 30], [4, 30]], "ignore": [[40, 4], [48, 4], [48, 12], [40, 12]]}
        shapes = [{"label": label, "labels": [label], "shape_type": "polygon", "image_name": f"{number}.jpg",
                   "points": points} for label, points in corners.items()]  # fmt: skip
        write_json(folder / f"{number}.json", {"text": [text], "is_sentence": is_sentence, "shapes": shapes})
        noise(50, 40, number).save(folder / f"{number}.jpg")
    return root


def evaluate(folder: Path, processes: int, *arguments) -> subprocess.CompletedProcess:
    """Run PROGRAM on a number of processes; its file is written to `folder`."""
    script = folder / "program.py"
    script.write_text(PROGRAM)
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *(launch if processes > 1 else []), script, *arguments]
    return subprocess.run([*map(str, command)], env=environment, capture_output=True, text=True, timeout=300)
