"""Semantic and part segmentation: ade20k, cocostuff, mapillary (label maps), paco_lvis, pascal_part (annotations).

dataset/README.md shows the folders. A conversation asks for one class, or for one part annotation.
"""

import os
from importlib.resources import files
from pathlib import Path

import numpy as np

from self1e.data.coco import CocoIndex
from self1e.data.masks import IGNORED, load_label_map, orient
from self1e.data.paths import list_names
from self1e.data.readers import fields
from self1e.data.samples import PhotoFolder, Sample, SampleError, TrainingSet, draw, image_keys, load_oriented
from self1e.files import read_json
from self1e.model import prompts


def class_names(name: str) -> list[str]:
    """Class list shipped with the package, "ade20k" (150) or "cocostuff" (182), in label order."""
    return files("self1e.data").joinpath("classes", f"{name}.txt").read_text(encoding="utf-8").splitlines()


class LabelMapSet(TrainingSet):
    """Photos (.jpg) with a label map (.png) of the same name each.

    Sub-classes give `name`, `paths` (first the folder of label maps, then that of photos) and `read_names`, and change
    what the attributes below say where it differs.

    listed: "photos" or "labels", whichever folder's files are the samples
    """

    listed = "labels"
    first_label = 0  # label of the first class; smaller ones are ignored

    def __init__(self, dataset_dir: Path, data_dir: Path, *, conversations: int, allow_outside: bool = False):
        self.labels, self.photos = self.paths(dataset_dir, data_dir)[:2]
        self.conversations = conversations
        self.names = [name.strip().lower() for name in self.read_names(Path(dataset_dir))]
        folder, suffix = (self.photos, ".jpg") if self.listed == "photos" else (self.labels, ".png")
        stems = sorted(name.removesuffix(suffix) for name in list_names(folder, suffix))
        self.stems = np.array([os.fsencode(stem) for stem in stems], dtype="S")  # a tenth of a list's memory

    def read_names(self, dataset_dir: Path) -> list[str]:
        """Class names in label order."""
        return class_names(self.name)

    def usable(self, label: int) -> bool:
        """Whether a class may be asked for."""
        return True

    def __len__(self) -> int:
        return len(self.stems)

    def image_keys(self) -> np.ndarray:
        return image_keys(f"{os.fsdecode(stem)}.jpg" for stem in self.stems)

    def read(self, index: int, rng: np.random.Generator) -> Sample | None:
        stem = os.fsdecode(self.stems[index])
        id = f"{self.name}/{stem}.jpg"
        labels = load_label_map(self.labels / f"{stem}.png", id)
        present = [v for v in np.unique(labels).tolist() if self.first_label <= v != IGNORED]
        if present and present[-1] - self.first_label >= len(self.names):
            raise SampleError(id, f"its label map holds {present[-1]}, which is no class of {self.name}")
        present = [v for v in present if self.usable(v - self.first_label)]
        if not present:
            return None
        image, orientation = load_oriented(self.photos / f"{stem}.jpg", id)
        labels = orient(labels, image, orientation)
        conversations, masks = [], []
        for value in draw(present, self.conversations, rng):
            name = self.names[value - self.first_label]
            conversations.append([prompts.question(name, rng, is_sentence=False), prompts.answer(rng)])
            masks.append((labels == value).astype(np.uint8)[None])
        return Sample(id, image, conversations, masks)


class ADE20K(LabelMapSet):
    name = "ade20k"
    listed = "photos"
    first_label = 1  # 0 = other

    @classmethod
    def paths(cls, dataset_dir: Path, data_dir: Path) -> list[Path]:
        root = Path(dataset_dir) / "ade20k"
        return [root / "annotations" / "training", root / "images" / "training"]


class COCOStuff(LabelMapSet):
    name = "cocostuff"
    cap = 30_000

    @classmethod
    def paths(cls, dataset_dir: Path, data_dir: Path) -> list[Path]:
        return [Path(dataset_dir) / "cocostuff" / "train2017", Path(dataset_dir) / "coco" / "train2017"]

    def usable(self, label: int) -> bool:
        return "-" not in self.names[label]


class Mapillary(LabelMapSet):
    name = "mapillary"

    @classmethod
    def paths(cls, dataset_dir: Path, data_dir: Path) -> list[Path]:
        root = Path(dataset_dir) / "mapillary"
        return [root / "training" / "v2.0" / "labels", root / "training" / "images", root / "config_v2.0.json"]

    def read_names(self, dataset_dir: Path) -> list[str]:
        path = self.paths(dataset_dir, dataset_dir)[2]
        (labels,) = fields(read_json(path, dict), str(path), labels=list)
        return [fields(label, str(path), readable=str)[0] for label in labels]


class PartSet(TrainingSet):
    """Photos with COCO-style part annotations; a conversation is about one annotation with its own mask."""

    def __init__(self, dataset_dir: Path, data_dir: Path, *, conversations: int, allow_outside: bool = False):
        annotations, photos = self.paths(dataset_dir, data_dir)[:2]
        self.photos = PhotoFolder(photos, allow_outside)
        self.conversations = conversations
        self.coco = CocoIndex(annotations)
        self.problems = self.coco.problems
        self.names = {id: self.split_name(name) for id, name in self.coco.categories.items()}
        self.image_ids = self.coco.image_ids

    @staticmethod
    def split_name(name: str) -> tuple[str, ...]:
        """(object,) or (object, part), lower case."""
        return tuple(piece.strip().lower() for piece in name.split(":", 1))

    def __len__(self) -> int:
        return len(self.image_ids)

    def image_keys(self) -> np.ndarray:
        return self.coco.image_keys

    def read(self, index: int, rng: np.random.Generator) -> Sample | None:
        found = map(self.coco.annotation_at, self.coco.annotations_of(int(self.image_ids[index])))
        usable = [annotation for annotation in found if annotation["segmentation"]]
        if not usable:
            return None
        file_name, height, width = self.coco.image(index)
        id = f"{self.name}/{file_name}"
        image, orientation = self.photos.load(file_name, id)
        conversations, masks = [], []
        for annotation in draw(usable, self.conversations, rng):
            if annotation["category_id"] not in self.names:
                raise SampleError(id, f"annotation {annotation['id']}: unknown category {annotation['category_id']}")
            names = self.names[annotation["category_id"]]
            phrases = (" ".join(names), f"the {names[1]} of the {names[0]}") if len(names) == 2 else names
            name = phrases[rng.integers(len(phrases))]
            conversations.append([prompts.question(name, rng, is_sentence=False), prompts.answer(rng)])
            masks.append(orient(self.coco.mask(annotation, height, width, id), image, orientation)[None])
        return Sample(id, image, conversations, masks)


class PACO(PartSet):
    name = "paco_lvis"
    cap = 30_000

    @classmethod
    def paths(cls, dataset_dir: Path, data_dir: Path) -> list[Path]:
        annotations = Path(dataset_dir) / "vlpart" / "paco" / "annotations" / "paco_lvis_v1_train.json"
        photos = Path(dataset_dir) / "coco"  # file names start with train2017/
        return [annotations, photos, photos / "train2017"]

    @staticmethod
    def split_name(name: str) -> tuple[str, ...]:
        """LVIS names carry a sense, "mug_(drinking_vessel):handle": what follows `_(` is dropped."""
        return tuple(piece.split("_(", 1)[0] for piece in PartSet.split_name(name))


class PascalPart(PartSet):
    name = "pascal_part"

    @classmethod
    def paths(cls, dataset_dir: Path, data_dir: Path) -> list[Path]:
        root = Path(dataset_dir) / "vlpart" / "pascal_part"
        return [root / "train.json", root / "VOCdevkit" / "VOC2010" / "JPEGImages"]
