"""ReasonSeg: photos with implied queries and labelme polygons; explanations for part of the training photos.

reason_seg/ReasonSeg/{train, val, test}/*.{jpg, json}
reason_seg/ReasonSeg/explanatory/train.json
"""

import reprlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from PIL import Image

from self1e.data.masks import IGNORED
from self1e.data.readers import fields
from self1e.data.samples import check_texts, list_names
from self1e.data.sets.expressions import Expression, ExpressionSet
from self1e.errors import UserError, check_known
from self1e.files import read_json
from self1e.model import prompts

SPLITS = ("train", "val", "test")


def paint_shapes(shapes: list[dict], height: int, width: int) -> np.ndarray:
    """ReasonSeg's labelme polygons -> uint8 (height, width): 1 target, 255 ignored.

    Painted from large to small (by painted pixels; the earlier of two equals comes last), points cut to integers, the
    outline of thickness 1 included. A label holding "ignore" gives 255, equal to "flag" is skipped, whatever the case.
    Raises UserError for shapes that are no polygons.
    """
    polygons = []
    for number, shape in enumerate(shapes):
        if not isinstance(shape, dict) or not isinstance(shape.get("label"), str) or "points" not in shape:
            raise UserError(f"shapes[{number}] has no label or no points")
        label = shape["label"].lower()
        if label == "flag":
            continue
        if (kind := shape.get("shape_type", "polygon")) not in ("polygon", None):
            raise UserError(f"shapes[{number}] is a {kind}; draw it as a polygon")
        points = np.asarray(shape["points"])
        if points.dtype.kind not in "iuf" or points.shape[1:] != (2,) or not (np.abs(points) < 1e6).all():
            raise UserError(f"shapes[{number}] needs finite points (x, y)")
        points = points.astype(np.int32)
        area = int(_paint(np.zeros((height, width), np.uint8), points, 1).sum())
        polygons.append((area, points, IGNORED if "ignore" in label else 1))
    mask = np.zeros((height, width), np.uint8)
    for _, points, value in sorted(reversed(polygons), key=lambda polygon: -polygon[0]):
        _paint(mask, points, value)
    return mask


def _paint(mask: np.ndarray, points: np.ndarray, value: int) -> np.ndarray:
    cv2.polylines(mask, [points], isClosed=True, color=value, thickness=1)
    return cv2.fillPoly(mask, [points], color=value)


class ReasonSeg(ExpressionSet):
    """The photos of one or several splits, such as "ReasonSeg|val" or "ReasonSeg|train_val", each with one mask.

    explanatory: -1 = off. Else, for a photo with an explanation, the share of samples that are text alone; the rest is
                 half [SEG] alone, half [SEG] followed by the explanation.
    """

    redrawn = True
    lower = stored = False
    asked = 1

    def paths(self) -> list[Path]:
        """The folders of the splits. Raises UserError for an unknown one."""
        splits = (self.name.partition("|")[2] or "train").split("_")
        check_known("unknown ReasonSeg split", splits, SPLITS)
        return [self.dataset_dir / "reason_seg" / "ReasonSeg" / split for split in splits]

    def open(self, *folders: Path) -> None:
        self.name = "ReasonSeg"
        self.photos = [folder / name for folder in folders for name in list_names(folder, ".jpg")]
        self.explanatory = self.flags.get("explanatory", -1)
        self.explanations: dict[str, str] = {}
        if self.explanatory != -1:
            if not 0 <= self.explanatory <= 1:
                raise UserError(f"--explanatory is {self.explanatory}; expected -1 (off) or a share from 0 to 1")
            path = folders[0].parent / "explanatory" / "train.json"
            records = read_json(path, list)
            self.explanations = dict(fields(record, str(path), image=str, outputs=str) for record in records)

    def __len__(self) -> int:
        return len(self.photos)

    def file_name(self, index: int) -> str:
        return self.photos[index].name

    def photo(self, index: int) -> Path:
        return self.photos[index]

    def _record(self, index: int) -> list[Any]:
        """Texts, whether they are sentences, and shapes of the JSON beside a photo. Raises UserError."""
        path = self.photos[index].with_suffix(".json")
        record = read_json(path, dict, "cp1252")
        return fields(record, str(path), text=list, is_sentence=(bool, int), shapes=list)

    def expressions(self, index: int) -> list[Expression]:
        texts, is_sentence, _ = self._record(index)
        if not all(isinstance(text, str) for text in texts):
            raise UserError(f"text is {reprlib.repr(texts)}, no list of texts")
        shapes = self.photos[index].with_suffix(".json").name
        return [Expression(text, [shapes], "", bool(is_sentence)) for text in texts]

    def mask(self, index: int, target: str, image: Image.Image) -> np.ndarray:
        return paint_shapes(self._record(index)[2], image.height, image.width)

    def conversing(self, index: int, rng: np.random.Generator) -> Callable[[Expression], list[str]]:
        if (explanation := self.explanations.get(self.file_name(index))) is None:
            return super().conversing(index, rng)
        check_texts([explanation])
        if rng.random() < self.explanatory:
            return lambda each: [f"{prompts.IMAGE_TAG}\n{each.text}", explanation]
        if not rng.integers(2):
            return super().conversing(index, rng)
        questions = prompts.EXPLANATORY_QUESTIONS
        return lambda each: [prompts.draw(questions, each.text, rng), f"{prompts.answer(rng)} {explanation}"]
