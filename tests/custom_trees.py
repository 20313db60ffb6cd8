"""Own data for tests: COCO-style JSON, CSV and JSONL with drawn pictures, and what was read from them."""

import csv
import json

from trees import SQUARE, instances, photo, write_json

from self1e.data.sets.custom import Custom
from self1e.data.splits import load_split

AREA = 6 * 6
OTHER = [12, 0, 16, 0, 16, 6, 12, 6]  # 4 x 6, apart from SQUARE
COLUMNS = ("image", "mask", "prompt")


def annotation(id, image_id=1, *polygons, **fields):
    return {"id": id, "image_id": image_id, "segmentation": list(polygons or [SQUARE]), **fields}


def coco_set(root, annotations, images=((1, "a.jpg"),), categories=("Dog", "cat"), below="images"):
    for _, name in images:
        photo(root / below / name)
    return write_json(root / "train.json", instances(images, annotations, categories))


def table(root, rows, header=COLUMNS, name="train.csv", **options):
    """A CSV or, by its name, a JSONL."""
    root.mkdir(parents=True, exist_ok=True)
    with open(root / name, "w", newline="", encoding=options.pop("encoding", "utf-8")) as file:
        if name.endswith(".jsonl"):
            file.writelines(json.dumps(dict(zip(header, row))) + "\n" for row in rows)
        else:
            csv.writer(file, **options).writerows([header, *rows])
    return root / name


def train(source, conversations=9):
    return Custom(f"custom|{source}", ".", num_classes_per_sample=conversations).opened()


def targets(sample):
    """{question without its template: area}"""
    return {question: int(m.sum()) for (question, _), m in zip(sample.conversations, sample.masks)}


def split(source):
    return load_split(f"custom|{source}", ".")


def sentences(image):
    return [each.text for each in image.expressions]


def unit_areas(image):
    _, masks = image.load()
    return dict(zip(sentences(image), masks.sum((1, 2)).tolist()))
