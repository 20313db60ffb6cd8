"""ReasonSeg: photos with implied queries and labelme polygons; explanations for part of the training photos.

reason_seg/ReasonSeg/{train, val, test}/*.{jpg, json}
reason_seg/ReasonSeg/explanatory/train.json
"""

import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from self1e.data.masks import paint_shapes
from self1e.data.paths import DATASETS
from self1e.data.readers import expected_schema, shown, take
from self1e.data.samples import (
    Annotation,
    EvalImage,
    EvalSplit,
    Records,
    Sample,
    SampleError,
    TrainingSet,
    image_keys,
    load_image,
)
from self1e.files import read_json
from self1e.flags import check_known
from self1e.model import prompts

SPLITS = ("train", "val", "test")


def _root(dataset_dir: Path) -> Path:
    return Path(dataset_dir) / "reason_seg" / "ReasonSeg"


def _photos(dataset_dir: Path, splits: list[str]) -> list[Path]:
    return [path for split in splits for path in sorted((_root(dataset_dir) / split).glob("*.jpg"))]


def read_record(photo: Path, id: str) -> dict:
    """{text, is_sentence, shapes} of the JSON beside a photo, UTF-8 or cp1252. Raises SampleError under `id`."""
    path = photo.with_suffix(".json")
    try:
        raw = path.read_bytes()
        try:
            text = raw.decode("utf-8-sig")
        except UnicodeDecodeError:
            text = raw.decode("cp1252")
        record: dict[str, Any] = json.loads(text)
        kinds = {"text": (list,), "is_sentence": (bool, int), "shapes": (list,)}
        record = {key: take(record, key, *kinds[key]) for key in kinds}
        if not all(isinstance(text, str) for text in record["text"]):
            raise TypeError(f"text is {shown(record['text'])}, not a list of strings")
        return record
    except KeyError as error:
        raise SampleError(id, f"{path}: key {error} is missing") from error
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise SampleError(id, f"cannot read {path}: {error}") from error


def load_mask(photo: Path, shapes: list[dict], id: str) -> tuple[Image.Image, np.ndarray]:
    """Photo and uint8 (H, W) mask, 255 = ignored, drawn in the oriented photo's frame."""
    image = load_image(photo, id)
    try:
        return image, paint_shapes(shapes, image.height, image.width)
    except ValueError as error:
        raise SampleError(id, f"{photo.with_suffix('.json')}: {error}") from error


class PhotoRecords(Records):
    """What training set and splits answer alike from their photos."""

    photos: list[Path]

    def keys(self) -> np.ndarray:
        return image_keys(photo.name for photo in self.photos)

    def annotations(self, item: int, image: Image.Image) -> Iterator[Annotation]:
        for number, shape in enumerate(read_record(self.photos[item], self.photos[item].name)["shapes"]):
            if shape["points"]:
                points = [number for point in shape["points"] for number in point]
                yield Annotation(f"shapes[{number}]", [points], image.height, image.width)

    def faults(self) -> list[str]:
        """The JSON files beside the photos that belong to none of them, for example because a photo ends with .JPG."""
        known = set(self.photos)
        folders = sorted({photo.parent for photo in self.photos})
        files = [path for folder in folders for path in sorted(folder.glob("*.json"))]
        return [
            f"{path} is not read: no {path.stem}.jpg is beside it"
            for path in files
            if path.with_suffix(".jpg") not in known
        ]


class ReasonSeg(PhotoRecords, TrainingSet):
    """Training photos of one or several splits.

    splits:      names joined by "_", such as "train_val"
    explanatory: -1 = off. Else, for a photo with an explanation, the share of samples that are text alone; the rest is
                 half [SEG] alone, half [SEG] followed by the explanation.
    """

    name = "ReasonSeg"
    redrawn = True

    def __init__(
        self,
        dataset_dir: Path,
        data_dir: Path,
        *,
        rows: int,
        allow_outside: bool = False,
        splits: str = "train",
        explanatory: float = -1,
    ):
        if explanatory != -1 and not 0 <= explanatory <= 1:
            raise ValueError(f"--explanatory is {explanatory}; expected -1 (off) or a share from 0 to 1")
        self.photos = _photos(dataset_dir, split_names(splits))
        self.rows = rows
        self.explanatory = explanatory
        self.explanations = _explanations(dataset_dir) if explanatory != -1 else {}
        self.choose(len(self.photos), _root(dataset_dir))

    @classmethod
    def paths(cls, dataset_dir: Path, data_dir: Path, splits: str = "train", explanatory: float = -1) -> list[Path]:
        explained = [_explanation_file(dataset_dir)] if explanatory != -1 else []
        return [_root(dataset_dir) / split for split in split_names(splits)] + explained

    @classmethod
    def everything(cls, dataset_dir: Path, data_dir: Path) -> dict[str, Any]:
        return {"explanatory": 0.0} if _explanation_file(dataset_dir).exists() else {}

    def contents(self) -> Iterator[bytes]:
        yield json.dumps(self.explanations).encode()
        for photo in self.photos:
            record = photo.with_suffix(".json")
            yield photo.name.encode(errors="surrogateescape")
            yield record.read_bytes() if record.is_file() else b""

    def files(self, item: int) -> list[Path]:
        return [self.photos[item]]

    @property
    def explained(self) -> int:
        """Number of samples that have an explanation."""
        return sum(self.photos[item].name in self.explanations for item in self.items)

    def read(self, item: int, rng: np.random.Generator) -> Sample | None:
        photo = self.photos[item]
        id = f"{self.name}/{photo.name}"
        record = read_record(photo, id)
        texts = record["text"]
        if not texts:
            return None
        image, mask = load_mask(photo, record["shapes"], id)
        target = (mask == 1).astype(np.uint8)[None]
        explanation = self.explanations.get(photo.name, "")
        kind = "mask"
        if photo.name in self.explanations:
            kind = "text" if rng.random() < self.explanatory else ("mask", "both")[rng.integers(2)]
        conversations, masks = [], []
        for text in self.draw(texts, rng):
            conversations.append(_turns(text, record["is_sentence"], kind, explanation, rng))
            masks.append(target[:0] if kind == "text" else target)
        return Sample(id, image, conversations, masks)


def _turns(text: str, is_sentence: bool, kind: str, explanation: str, rng: np.random.Generator) -> list[str]:
    if kind == "text":
        return [f"{prompts.IMAGE_TAG}\n{text}", explanation]
    if kind == "both":
        return [prompts.explanatory_question(text, rng), f"{prompts.answer(rng)} {explanation}"]
    return [prompts.question(text, rng, is_sentence=is_sentence), prompts.answer(rng)]


def _explanation_file(dataset_dir: Path) -> Path:
    return _root(dataset_dir) / "explanatory" / "train.json"


def _explanations(dataset_dir: Path) -> dict[str, str]:
    path = _explanation_file(dataset_dir)
    records = read_json(path, list, remedy=f"see {DATASETS}")
    with expected_schema(path):
        return {take(record, "image", str): take(record, "outputs", str) for record in records}


def split_names(splits: str) -> list[str]:
    """ "train_val" -> ["train", "val"]. Raises ValueError for an unknown one."""
    names = splits.split("_")
    check_known("unknown ReasonSeg split", names, SPLITS, note=", joined by _")
    return names


class ReasoningSplit(PhotoRecords, EvalSplit):
    """An evaluation split with one unit per photo, the first text; `name` is "ReasonSeg|<split>"."""

    def __init__(self, name: str, dataset_dir: Path, *, allow_outside: bool = False):
        self.name = name
        self.photos = _photos(dataset_dir, split_names(name.split("|")[1]))

    @staticmethod
    def paths(name: str, dataset_dir: Path) -> list[Path]:
        return [_root(dataset_dir) / split for split in split_names(name.split("|")[1])]

    def __len__(self) -> int:
        return len(self.photos)

    def read(self, item: int) -> EvalImage:
        photo = self.photos[item]
        id = f"ReasonSeg/{photo.name}"
        record = read_record(photo, id)
        if not record["text"]:
            raise SampleError(id, "its JSON holds no text")
        return EvalImage(
            image_id=photo.name,
            sentences=record["text"][:1],
            is_sentence=[bool(record["is_sentence"])],
            unit_ids=[photo.name],
            no_target=[False],
            lower=False,
            load=partial(_load_unit, photo, record["shapes"], id),
        )


def _load_unit(photo: Path, shapes: list[dict], id: str) -> tuple[Image.Image, np.ndarray]:
    image, mask = load_mask(photo, shapes, id)
    return image, mask[None]
