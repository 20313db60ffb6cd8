"""Photos with expressions, each of which means some of the photo's annotations.

`referring` and `custom` say where expressions, photos and masks are; what training and evaluation
make of them stands here.
"""

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from self1e.data.masks import decode_each, orient
from self1e.data.samples import (
    Annotation,
    EvalImage,
    EvalSplit,
    PhotoFolder,
    Records,
    Sample,
    SampleError,
    TrainingSet,
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


class ExpressionData(Records):
    """The photos of one split or source; `photos` is where they are."""

    name: str
    sources: list[str]  # SHA-256 of the annotation files
    photos: PhotoFolder
    sized = True  # masks must have the size of their photo

    @abstractmethod
    def __len__(self) -> int:
        """Number of photos."""

    @abstractmethod
    def expressions(self, item: int) -> list[Expression]:
        """Every expression of a photo."""

    @abstractmethod
    def file_name(self, item: int) -> str:
        """Name of the photo in the annotations."""

    def photo(self, item: int, id: str) -> Path:
        """Where the photo is. Raises SampleError under `id`."""
        return self.photos.path(self.file_name(item), id)

    @abstractmethod
    def mask(self, item: int, target: Any, id: str) -> np.ndarray:
        """The mask of an annotation in the stored frame, uint8 {0, 1} (H, W). Raises SampleError under `id`."""

    def files(self, item: int) -> list[Path]:
        """The files that a photo alone needs, as `TrainingSet.files`."""
        return [self.photo(item, f"{self.name}/{self.file_name(item)}")]

    def where(self, target: Any) -> str:
        """How messages call an annotation."""
        return f"annotation {target}"

    def load(self, item: int, wanted: Sequence[list[Any]]) -> tuple[Image.Image, np.ndarray]:
        """Photo, and for each list of annotations the union of their masks (n, H, W). Raises SampleError."""
        id = f"{self.name}/{self.file_name(item)}"
        image, orientation = load_oriented(self.photo(item, id), id)

        def decode(target: Any) -> np.ndarray:
            mask = orient(self.mask(item, target, id), image, orientation)
            if self.sized and mask.shape != (image.height, image.width):
                sizes = f"{mask.shape[1]} x {mask.shape[0]}, the photo {image.width} x {image.height}"
                raise SampleError(id, f"{self.where(target)}: the mask's size is {sizes} pixels")
            return mask

        masks = decode_each(sorted({target for targets in wanted for target in targets}), decode, id)
        unions = [np.bitwise_or.reduce([masks[target] for target in targets]) for targets in wanted]
        return image, np.stack(unions) if unions else np.zeros((0, image.height, image.width), np.uint8)


class _Shared(Records):
    """What a training set and an evaluation split answer alike, from `data`."""

    data: ExpressionData

    def keys(self) -> np.ndarray:
        return self.data.keys()

    def annotations(self, item: int, image: Image.Image) -> Iterator[Annotation]:
        return self.data.annotations(item, image)

    def remarks(self) -> list[str]:
        return self.data.remarks()

    def counts(self) -> dict[str, int]:
        return self.data.counts()


class ExpressionSet(_Shared, TrainingSet):
    """Training photos; a row is one expression."""

    def contents(self) -> Iterator[bytes]:
        return map(str.encode, self.data.sources)

    def files(self, item: int) -> list[Path]:
        return self.data.files(item)

    def read(self, item: int, rng: np.random.Generator) -> Sample | None:
        expressions = self.data.expressions(item)
        if not expressions:
            return None
        chosen = self.draw(expressions, rng)
        conversations = [
            [prompts.question(each.text.strip(), rng, is_sentence=each.is_sentence), prompts.answer(rng)]
            for each in chosen
        ]
        image, masks = self.data.load(item, [each.targets for each in chosen])
        return Sample(f"{self.name}/{self.data.file_name(item)}", image, conversations, list(masks[:, None]))


class ExpressionSplit(_Shared, EvalSplit):
    """Photos for evaluation; a unit is one expression."""

    def __len__(self) -> int:
        return len(self.data)

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
