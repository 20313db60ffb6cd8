"""Photos with expressions, each of which means some of the photo's annotations.

`referring`, `reasoning`, `custom` and `parquet` say where expressions, photos and masks are; what training and
evaluation make of them stands here.
"""

from abc import abstractmethod
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from self1e.data.masks import orient
from self1e.data.samples import EvalImage, Sample, TrainingSet, check_texts, draw, naming
from self1e.errors import UserError
from self1e.model import prompts
from self1e.model.photos import read_picture


class Expression(NamedTuple):
    """A sentence about a photo."""

    text: str  # as read
    targets: list[Any]  # keys of the annotations that it means, at least one; its mask is their union
    place: str  # what its unit's id adds to the photo's name
    is_sentence: bool = False  # asked as it is, and not as a phrase
    no_target: bool = False  # the annotations say that nothing in the photo is meant


class ExpressionSet(TrainingSet):
    """Photos for training and, in a fixed order, for evaluation; a conversation, or a unit, is one expression."""

    asked: int | None = None  # expressions of a photo that are evaluated; None: all
    lower = True  # phrases are lower-cased in evaluation
    sized = True  # masks must have the size of their photo
    stored = True  # masks are those of the photo before its EXIF orientation is applied

    @abstractmethod
    def expressions(self, index: int) -> list[Expression]:
        """Every expression of a photo. Raises UserError."""

    @abstractmethod
    def mask(self, index: int, target: Any, image: Image.Image) -> np.ndarray:
        """The mask of an annotation, uint8 {0, 1} and 255 = ignored, (H, W); image: the upright photo."""

    def where(self, target: Any) -> str:
        """How messages call an annotation."""
        return f"annotation {target}"

    def load(self, index: int, wanted: Sequence[list[Any]]) -> tuple[Image.Image, np.ndarray]:
        """Photo, and for each list of annotations the union of their masks, uint8 (n, H, W). Raises SampleError."""
        with naming(self.id(index)):
            image, orientation = read_picture(self.photo(index))
            masks = {}
            for target in dict.fromkeys(target for targets in wanted for target in targets):
                mask = self.mask(index, target, image)
                masks[target] = mask = orient(mask, image, orientation) if self.stored else mask
                if self.sized and mask.shape != (image.height, image.width):
                    sizes = f"{mask.shape[1]} x {mask.shape[0]}, the photo {image.width} x {image.height}"
                    raise UserError(f"{self.where(target)}: the mask's size is {sizes} pixels")
        unions = [np.bitwise_or.reduce([masks[target] for target in targets]) for targets in wanted]
        return image, np.stack(unions) if unions else np.zeros((0, image.height, image.width), np.uint8)

    def read(self, index: int, rng: np.random.Generator) -> Sample | None:
        expressions = self.expressions(index)
        if not expressions:
            return None
        chosen = draw(expressions, self.conversations, rng)
        conversations = [
            [prompts.question(each.text.strip(), rng, is_sentence=each.is_sentence), prompts.answer(rng)]
            for each in chosen
        ]
        image, masks = self.load(index, [each.targets for each in chosen])
        return Sample(self.id(index), image, conversations, list((masks[:, None] == 1).astype(np.uint8)))

    def __getitem__(self, index: int) -> EvalImage:
        """A photo with what is asked about it. Raises SampleError, also for control tokens in a text."""
        with naming(self.id(index)):
            expressions, file_name = self.expressions(index)[: self.asked], self.file_name(index)
            if not expressions:
                raise UserError("it has no sentence")
        asked = [prompts.evaluation_prompt(each.text, each.is_sentence, self.lower) for each in expressions]
        check_texts(self.id(index), (prompt.removeprefix(prompts.IMAGE_TAG) for prompt in asked))
        ids = [file_name + each.place for each in expressions]
        return EvalImage(
            image_id=file_name,
            sentences=[each.text for each in expressions],
            is_sentence=[each.is_sentence for each in expressions],
            unit_ids=[f"{id}#{ids[:k].count(id)}" if id in ids[:k] else id for k, id in enumerate(ids)],
            no_target=[each.no_target for each in expressions],
            prompts=asked,
            load=partial(self.load, index, [each.targets for each in expressions]),
        )
