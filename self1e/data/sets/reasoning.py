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
from self1e.data.paths import list_names
from self1e.data.readers import fields
from self1e.data.samples import EvalImage, EvalSplit, Sample, SampleError, TrainingSet, draw, image_keys, load_image
from self1e.errors import UserError, check_known
from self1e.files import read_json
from self1e.model import prompts

SPLITS = ("train", "val", "test")


class ReasonPhotos:
    """The photos of one or several splits with their records."""

    def __init__(self, dataset_dir: Path, splits: list[str]):
        folders = [_root(dataset_dir) / split for split in splits]
        self.photos = [folder / name for folder in folders for name in list_names(folder, ".jpg")]

    @property
    def problems(self) -> list[str]:
        """The JSON files beside the photos that belong to none of them, for example because a photo ends with .JPG."""
        known = {photo.with_suffix(".json") for photo in self.photos}
        folders = sorted({photo.parent for photo in self.photos})
        files = [folder / name for folder in folders for name in list_names(folder, ".json")]
        return [f"{path} is not read: no {path.stem}.jpg is beside it" for path in files if path not in known]

    def image_keys(self) -> np.ndarray:
        return image_keys(photo.name for photo in self.photos)

    def record(self, item: int) -> tuple[list[str], bool, list[dict]]:
        """Texts, whether they are sentences, and shapes of the JSON beside a photo. Raises SampleError."""
        path = self.photos[item].with_suffix(".json")
        id = f"ReasonSeg/{self.photos[item].name}"
        try:
            raw = path.read_bytes()
            try:
                text = raw.decode("utf-8-sig")
            except UnicodeDecodeError:
                text = raw.decode("cp1252")
            record = json.loads(text)
            texts, is_sentence, shapes = fields(record, str(path), text=list, is_sentence=(bool, int), shapes=list)
        except UserError as error:
            raise SampleError(id, str(error)) from error
        except (OSError, ValueError) as error:
            raise SampleError(id, f"cannot read {path}: {error}") from error
        return texts, bool(is_sentence), shapes

    def load(self, item: int, shapes: list[dict]) -> tuple[Image.Image, np.ndarray]:
        """Photo and uint8 (1, H, W) mask, 255 = ignored, drawn in the oriented photo's frame. Raises SampleError."""
        photo = self.photos[item]
        id = f"ReasonSeg/{photo.name}"
        image = load_image(photo, id)
        try:
            return image, paint_shapes(shapes, image.height, image.width)[None]
        except ValueError as error:
            raise SampleError(id, f"{photo.with_suffix('.json')}: {error}") from error


class ReasonSeg(TrainingSet):
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
        conversations: int,
        allow_outside: bool = False,
        splits: str = "train",
        explanatory: float = -1,
    ):
        self.data = ReasonPhotos(dataset_dir, split_names(splits))
        self.problems = self.data.problems
        self.conversations, self.explanatory = conversations, explanatory
        self.explanations: dict[str, str] = {}
        if explanatory != -1:
            path = _explanation_file(dataset_dir)
            records = read_json(path, list)
            self.explanations = dict(fields(record, str(path), image=str, outputs=str) for record in records)

    @classmethod
    def paths(cls, dataset_dir: Path, data_dir: Path, splits: str = "train", explanatory: float = -1) -> list[Path]:
        explained = [_explanation_file(dataset_dir)] if explanatory != -1 else []
        return [_root(dataset_dir) / split for split in split_names(splits)] + explained

    def __len__(self) -> int:
        return len(self.data.photos)

    def image_keys(self) -> np.ndarray:
        return self.data.image_keys()

    def read(self, index: int, rng: np.random.Generator) -> Sample | None:
        texts, is_sentence, shapes = self.data.record(index)
        if not texts:
            return None
        photo = self.data.photos[index].name
        image, mask = self.data.load(index, shapes)
        target = (mask == 1).astype(np.uint8)
        explanation = self.explanations.get(photo, "")
        kind = "mask"
        if photo in self.explanations:
            kind = "text" if rng.random() < self.explanatory else ("mask", "both")[rng.integers(2)]
        chosen = draw(texts, self.conversations, rng)
        conversations = [_turns(text, is_sentence, kind, explanation, rng) for text in chosen]
        return Sample(f"{self.name}/{photo}", image, conversations, [target[: kind != "text"]] * len(chosen))


def _turns(text: str, is_sentence: bool, kind: str, explanation: str, rng: np.random.Generator) -> list[str]:
    if kind == "text":
        return [f"{prompts.IMAGE_TAG}\n{text}", explanation]
    if kind == "both":
        return [prompts.explanatory_question(text, rng), f"{prompts.answer(rng)} {explanation}"]
    return [prompts.question(text, rng, is_sentence=is_sentence), prompts.answer(rng)]


def _root(dataset_dir: Path) -> Path:
    return Path(dataset_dir) / "reason_seg" / "ReasonSeg"


def _explanation_file(dataset_dir: Path) -> Path:
    return _root(dataset_dir) / "explanatory" / "train.json"


def split_names(splits: str) -> list[str]:
    """ "train_val" -> ["train", "val"]. Raises UserError for an unknown one."""
    names = splits.split("_")
    check_known("unknown ReasonSeg split", names, SPLITS)
    return names


class ReasoningSplit(EvalSplit):
    """An evaluation split with one unit per photo, the first text; `name` is "ReasonSeg|<split>"."""

    def __init__(self, name: str, dataset_dir: Path, *, allow_outside: bool = False):
        self.name = name
        self.data = ReasonPhotos(dataset_dir, split_names(name.split("|")[1]))
        self.problems = self.data.problems

    @staticmethod
    def paths(name: str, dataset_dir: Path) -> list[Path]:
        return [_root(dataset_dir) / split for split in split_names(name.split("|")[1])]

    def __len__(self) -> int:
        return len(self.data.photos)

    def image_keys(self) -> np.ndarray:
        return self.data.image_keys()

    def read(self, item: int) -> EvalImage:
        photo = self.data.photos[item].name
        texts, is_sentence, shapes = self.data.record(item)
        if not texts:
            raise SampleError(f"ReasonSeg/{photo}", "its JSON holds no text")
        return EvalImage(
            image_id=photo,
            sentences=texts[:1],
            is_sentence=[is_sentence],
            unit_ids=[photo],
            no_target=[False],
            lower=False,
            load=partial(self.data.load, item, shapes),
        )
