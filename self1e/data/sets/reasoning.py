"""ReasonSeg: photos with implied queries and labelme polygons; explanations for part of the training photos.

reason_seg/ReasonSeg/{train, val, test}/*.{jpg, json}
reason_seg/ReasonSeg/explanatory/train.json
"""

import json
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from self1e.data.masks import paint_shapes
from self1e.data.paths import README
from self1e.data.sample import EvalImage, EvalSplit, Sample, SampleError, TrainingSet, image_keys, load_image
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
        record = json.loads(text)
        return {key: record[key] for key in ("text", "is_sentence", "shapes")}
    except KeyError as error:
        raise SampleError(id, f"{path}: key {error} is missing") from error
    except (OSError, ValueError, TypeError) as error:
        raise SampleError(id, f"cannot read {path}: {error}") from error


def load_mask(photo: Path, shapes: list[dict], id: str) -> tuple[Image.Image, np.ndarray]:
    """Photo and uint8 (H, W) mask, 255 = ignored, drawn in the oriented photo's frame."""
    image = load_image(photo, id)
    try:
        return image, paint_shapes(shapes, image.height, image.width)
    except ValueError as error:
        raise SampleError(id, f"{photo.with_suffix('.json')}: {error}") from error


class ReasonSeg(TrainingSet):
    """Training photos of one or several splits ("train", "train_val").

    explanatory: -1 = off. Else, for a photo with an explanation, the share of samples that are text alone; the rest is
                 half [SEG] alone, half [SEG] followed by the explanation.
    """

    name = "ReasonSeg"

    def __init__(
        self,
        dataset_dir: Path,
        data_dir: Path,
        *,
        rows: int,
        seed: int,
        splits: str = "train",
        explanatory: float = -1,
    ):
        if explanatory != -1 and not 0 <= explanatory <= 1:
            raise ValueError(f"--explanatory is {explanatory}; expected -1 (off) or a share from 0 to 1")
        self.photos = _photos(dataset_dir, split_names(splits))
        self.rows = rows
        self.explanatory = explanatory
        self.explanations = _explanations(dataset_dir) if explanatory != -1 else {}
        self.choose(len(self.photos), seed)

    @classmethod
    def paths(cls, dataset_dir: Path, data_dir: Path, splits: str = "train", explanatory: float = -1) -> list[Path]:
        root = _root(dataset_dir)
        explained = [root / "explanatory" / "train.json"] if explanatory != -1 else []
        return [root / split for split in split_names(splits)] + explained

    @property
    def explained(self) -> int:
        """Number of samples that have an explanation."""
        return sum(self.photos[item].name in self.explanations for item in self.items)

    def keys(self) -> np.ndarray:
        return image_keys(photo.name for photo in self.photos)

    def read(self, item: int, rng: np.random.Generator) -> Sample | None:
        photo = self.photos[item]
        id = f"{self.name}/{photo.name}"
        record = read_record(photo, id)
        texts = record["text"]
        if not texts:
            return None
        image, mask = load_mask(photo, record["shapes"], id)
        target = (mask == 1).astype(np.uint8)[None]
        explanation = self.explanations.get(photo.name)
        kind = "mask"
        if explanation is not None:
            kind = "text" if rng.random() < self.explanatory else ("mask", "both")[rng.integers(2)]
        conversations, masks = [], []
        for i in rng.choice(len(texts), min(self.rows, len(texts)), replace=False):
            conversations.append(_turns(texts[i], record["is_sentence"], kind, explanation, rng))
            masks.append(target[:0] if kind == "text" else target)
        return Sample(id, image, conversations, masks)


def _turns(text: str, is_sentence: bool, kind: str, explanation: str | None, rng: np.random.Generator) -> list[str]:
    if kind == "text":
        return [f"{prompts.IMAGE_TAG}\n{text}", explanation]
    if kind == "both":
        return [prompts.explanatory_question(text, rng), f"{prompts.answer(rng)} {explanation}"]
    question = prompts.long_question if is_sentence else prompts.short_question
    return [question(text, rng), prompts.answer(rng)]


def _explanations(dataset_dir: Path) -> dict[str, str]:
    path = _root(dataset_dir) / "explanatory" / "train.json"
    try:
        return {record["image"]: record["outputs"] for record in json.loads(path.read_text(encoding="utf-8"))}
    except KeyError as error:
        raise ValueError(f"{path}: key {error} is missing; is this the right file? See {README}") from error
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path} is no list of explanations ({error}); see {README}") from error


def split_names(splits: str) -> list[str]:
    """ "train_val" -> ["train", "val"]. Raises ValueError for an unknown one."""
    names = splits.split("_")
    unknown = [name for name in names if name not in SPLITS]
    if unknown:
        raise ValueError(f"unknown ReasonSeg split {', '.join(unknown)}; known: {', '.join(SPLITS)}, joined by _")
    return names


class ReasoningSplit(EvalSplit):
    """An evaluation split, a sequence of `EvalImage` with one unit each, the first text; name "ReasonSeg|<split>"."""

    def __init__(self, name: str, dataset_dir: Path):
        self.name = name
        self.photos = _photos(dataset_dir, split_names(name.split("|")[1]))

    @staticmethod
    def paths(name: str, dataset_dir: Path) -> list[Path]:
        """What must exist to evaluate it."""
        return [_root(dataset_dir) / split for split in split_names(name.split("|")[1])]

    def __len__(self) -> int:
        return len(self.photos)

    def keys(self) -> np.ndarray:
        """`image_key` of each photo."""
        return image_keys(photo.name for photo in self.photos)

    def __getitem__(self, item: int) -> EvalImage:
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
