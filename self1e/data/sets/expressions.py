"""Photos with expressions, each of which means some of the photo's annotations.

`referring` and `custom` say where expressions, photos and masks are; what training and evaluation make of them stands
here.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from self1e.data.masks import orient
from self1e.data.samples import (
    EvalImage,
    EvalSplit,
    PhotoFolder,
    Sample,
    SampleError,
    TrainingSet,
    draw,
    load_oriented,
)
from self1e.model import prompts


class Expression(NamedTuple):
    """A sentence about a photo."""

    text: str  # as read
    targets: list[Any]  # keys of the annotations that it means, at least one; its mask is their union
    place: str  # its name among the expressions of the photo
    is_sentence: bool = False  # asked as it is, and not as a phrase
    no_target: bool = False  # the annotations say that nothing in the photo is meant


class ExpressionData(ABC):
    """The photos of one split or source; `photos` is where they are, `problems` is what is wrong with its files."""

    name: str
    photos: PhotoFolder
    problems: Sequence[str] = ()
    sized = True  # masks must have the size of their photo

    @abstractmethod
    def __len__(self) -> int:
        """Number of photos."""

    @abstractmethod
    def image_keys(self) -> np.ndarray:
        """`image_key` of each photo, int64 (len,)."""

    @abstractmethod
    def expressions(self, item: int) -> list[Expression]:
        """Every expression of a photo."""

    @abstractmethod
    def file_name(self, item: int) -> str:
        """Name of the photo in the annotations."""

    @abstractmethod
    def mask(self, item: int, target: Any, id: str) -> np.ndarray:
        """The mask of an annotation in the stored frame, uint8 {0, 1} (H, W). Raises SampleError under `id`."""

    def photo(self, item: int, id: str) -> Path:
        """Where the photo is. Raises SampleError under `id`."""
        return self.photos.path(self.file_name(item), id)

    def where(self, target: Any) -> str:
        """How messages call an annotation."""
        return f"annotation {target}"

    def load(self, item: int, wanted: Sequence[list[Any]]) -> tuple[Image.Image, np.ndarray]:
        """Photo, and for each list of annotations the union of their masks, uint8 (n, H, W). Raises SampleError."""
        id = f"{self.name}/{self.file_name(item)}"
        image, orientation = load_oriented(self.photo(item, id), id)
        masks = {}
        for target in sorted({target for targets in wanted for target in targets}):
            masks[target] = mask = orient(self.mask(item, target, id), image, orientation)
            if self.sized and mask.shape != (image.height, image.width):
                sizes = f"{mask.shape[1]} x {mask.shape[0]}, the photo {image.width} x {image.height}"
                raise SampleError(id, f"{self.where(target)}: the mask's size is {sizes} pixels")
        unions = [np.bitwise_or.reduce([masks[target] for target in targets]) for targets in wanted]
        return image, np.stack(unions) if unions else np.zeros((0, image.height, image.width), np.uint8)


class ExpressionSet(TrainingSet):
    """Training photos of `data`; a conversation is one of its expressions."""

    def __init__(self, data: ExpressionData, *, conversations: int):
        self.data, self.conversations, self.problems = data, conversations, data.problems

    def __len__(self) -> int:
        return len(self.data)

    def image_keys(self) -> np.ndarray:
        return self.data.image_keys()

    def read(self, index: int, rng: np.random.Generator) -> Sample | None:
        expressions = self.data.expressions(index)
        if not expressions:
            return None
        chosen = draw(expressions, self.conversations, rng)
        conversations = [
            [prompts.question(each.text.strip(), rng, is_sentence=each.is_sentence), prompts.answer(rng)]
            for each in chosen
        ]
        image, masks = self.data.load(index, [each.targets for each in chosen])
        return Sample(f"{self.name}/{self.data.file_name(index)}", image, conversations, list(masks[:, None]))


class ExpressionSplit(EvalSplit):
    """Photos of `data` for evaluation; a unit is one expression."""

    def __init__(self, name: str, data: ExpressionData):
        self.name, self.data, self.problems = name, data, data.problems

    def __len__(self) -> int:
        return len(self.data)

    def image_keys(self) -> np.ndarray:
        return self.data.image_keys()

    def read(self, item: int) -> EvalImage:
        expressions, file_name = self.data.expressions(item), self.data.file_name(item)
        return EvalImage(
            image_id=file_name,
            sentences=[each.text for each in expressions],
            is_sentence=[each.is_sentence for each in expressions],
            unit_ids=unique([f"{file_name}/{each.place}" for each in expressions]),
            no_target=[each.no_target for each in expressions],
            lower=True,
            load=partial(self.data.load, item, [each.targets for each in expressions]),
        )


def unique(ids: list[str]) -> list[str]:
    """The ids; a repeated one gets its number appended."""
    return [f"{id}#{ids[:k].count(id)}" if id in ids[:k] else id for k, id in enumerate(ids)]
