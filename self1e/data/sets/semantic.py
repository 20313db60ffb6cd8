"""Semantic and part segmentation: ade20k, cocostuff, mapillary (label maps), paco_lvis, pascal_part (annotations).

dataset/README.md shows the folders. A conversation asks for one class, or for one part annotation.
"""

from importlib.resources import files
from pathlib import Path

import numpy as np

from self1e.data.masks import IGNORED, decode_segmentation, load_label_map, orient
from self1e.data.readers import fields, open_tables, read_coco
from self1e.data.samples import Sample, TrainingSet, draw, list_names, naming
from self1e.errors import UserError
from self1e.files import read_json
from self1e.model import prompts
from self1e.model.photos import photo_of


def class_names(name: str) -> list[str]:
    """Class list shipped with the package, "ade20k" (150) or "cocostuff" (182), in label order."""
    return files("self1e.data").joinpath("classes", f"{name}.txt").read_text(encoding="utf-8").splitlines()


class LabelMapSet(TrainingSet):
    """Label maps (.png), each with a photo (.jpg) of the same name; `files` are the folders of both, in this order."""

    def read_names(self) -> list[str]:
        """Names of the labels from 0 on, "" for those that nobody asks for."""
        return class_names(self.name)

    def open(self, labels: Path, photos: Path, *_: Path) -> None:
        self.labels, self.folder = labels, photos
        self.names = [name.strip().lower() for name in self.read_names()]
        # An array, of which forked workers copy nothing.
        self.stems = np.array(sorted(name.removesuffix(".png") for name in list_names(labels, ".png")), dtype=str)

    def __len__(self) -> int:
        return len(self.stems)

    def file_name(self, index: int) -> str:
        return f"{self.stems[index]}.jpg"

    def read(self, index: int, rng: np.random.Generator) -> Sample | None:
        labels = load_label_map(self.labels / f"{self.stems[index]}.png")
        present = [value for value in np.unique(labels).tolist() if value != IGNORED]
        if present and present[-1] >= len(self.names):
            raise UserError(f"its label map holds {present[-1]}, which is no class of {self.name}")
        asked = [value for value in present if self.names[value]]
        if not asked:
            return None
        image = photo_of(self.folder / self.file_name(index))
        labels, drawn = orient(labels, image), draw(asked, self.conversations, rng)
        names = [self.names[value] for value in drawn]
        conversations = [[prompts.question(name, rng, is_sentence=False), prompts.answer(rng)] for name in names]
        return Sample(self.id(index), image, conversations, [(labels == v).astype(np.uint8)[None] for v in drawn])


class ADE20K(LabelMapSet):
    files = "ade20k/annotations/training", "ade20k/images/training"

    def read_names(self) -> list[str]:
        return ["", *class_names(self.name)]  # 0 = other


class COCOStuff(LabelMapSet):
    files = "cocostuff/train2017", "coco/train2017"
    cap = 30_000

    def read_names(self) -> list[str]:
        return ["" if "-" in name else name for name in class_names(self.name)]


class Mapillary(LabelMapSet):
    files = "mapillary/training/v2.0/labels", "mapillary/training/images", "mapillary/config_v2.0.json"

    def read_names(self) -> list[str]:
        path = self.paths()[2]
        (labels,) = fields(read_json(path, dict), str(path), labels=list)
        return [fields(label, str(path), readable=str)[0] for label in labels]


class PartSet(TrainingSet):
    """Photos with COCO-style part annotations; a conversation is about one annotation with its own mask.

    `files` are the annotations and the folder of photos; a category is called "object" or "object:part".
    """

    senses = False  # the names of LVIS carry a sense, "mug_(drinking_vessel):handle": what follows `_(` is dropped

    def open(self, annotations: Path, photos: Path, *_: Path) -> None:
        tables = open_tables(annotations, read_coco)
        self.folder, self.problems = photos, list(tables["problems"])
        self.images, self.annotations = tables["images"], tables["annotations"]
        self.names = {id: name.lower().split(":", 1) for id, name in tables["categories"]}
        if self.senses:
            self.names = {id: [piece.split("_(", 1)[0] for piece in pieces] for id, pieces in self.names.items()}

    def __len__(self) -> int:
        return len(self.images)

    def file_name(self, index: int) -> str:
        return self.images[index][0]

    def read(self, index: int, rng: np.random.Generator) -> Sample | None:
        usable = [each for each in self.annotations.having(self.images.keys[index, 0], column=1) if each[2]]
        if not usable:
            return None
        _, *size = self.images[index]
        image = photo_of(self.photo(index))
        conversations, masks = [], []
        for id, category, segmentation in draw(usable, self.conversations, rng):
            with naming(f"annotation {id}"):
                if (names := self.names.get(category)) is None:
                    raise UserError(f"unknown category {category}")
                masks.append(orient(decode_segmentation(segmentation, *size), image)[None])
            phrases = (" ".join(names), f"the {names[1]} of the {names[0]}") if len(names) == 2 else names
            name = phrases[rng.integers(len(phrases))]
            conversations.append([prompts.question(name, rng, is_sentence=False), prompts.answer(rng)])
        return Sample(self.id(index), image, conversations, masks)


class PACO(PartSet):
    files = "vlpart/paco/annotations/paco_lvis_v1_train.json", "coco", "coco/train2017"  # names begin with train2017/
    cap = 30_000
    senses = True


class PascalPart(PartSet):
    files = "vlpart/pascal_part/train.json", "vlpart/pascal_part/VOCdevkit/VOC2010/JPEGImages"
