"""Photos with expressions, each of which means some of the photo's annotations.

`referring`, `reasoning`, `custom` and `parquet` say where expressions, photos and masks are; what training and
evaluation make of them stands here.
"""

from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from self1e.data.masks import orient
from self1e.data.samples import Sample, TrainingSet, check_texts, draw, naming
from self1e.errors import UserError
from self1e.model import prompts
from self1e.model.photos import photo_of


class Expression(NamedTuple):
    """A sentence about a photo."""

    text: str  # as read
    targets: list[Any]  # keys of the annotations that it means, at least one; its mask is their union
    suffix: str  # what its unit's id adds to the photo's name
    is_sentence: bool = False  # asked as it is, and not as a phrase
    no_target: bool = False  # the annotations say that nothing in the photo is meant


@dataclass(frozen=True)
class EvalImage:
    """One photo of an evaluation split; a unit is one sentence."""

    image_id: str  # file name (refclef: `file_name` of instances.json)
    expressions: list[Expression]
    unit_ids: list[str]  # of each, unique within the split, stable
    prompts: list[str]  # the fixed evaluation question of each unit
    # Photo (RGB, oriented), and masks uint8 (n, H, W) at the annotation's size, 255 = ignored. Raises UserError.
    load: Callable[[], tuple[Image.Image, np.ndarray]]


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
        """Photo, and for each list of annotations the union of their masks, uint8 (n, H, W). Raises UserError."""
        image = photo_of(self.photo(index))
        masks = {}
        for target in dict.fromkeys(target for targets in wanted for target in targets):
            with naming(self.where(target)):
                mask = self.mask(index, target, image)
                masks[target] = mask = orient(mask, image) if self.stored else mask
                if self.sized and mask.shape != (image.height, image.width):
                    sizes = f"{mask.shape[1]} x {mask.shape[0]}, the photo {image.width} x {image.height}"
                    raise UserError(f"the mask's size is {sizes} pixels")
        unions = [np.bitwise_or.reduce([masks[target] for target in targets]) for targets in wanted]
        return image, np.stack(unions) if unions else np.zeros((0, image.height, image.width), np.uint8)

    def conversing(self, index: int, rng: np.random.Generator) -> Callable[[Expression], list[str]]:
        """What makes a training conversation, question and answer, of an expression of a photo."""
        return lambda each: [
            prompts.question(each.text.strip(), rng, is_sentence=each.is_sentence),
            prompts.answer(rng),
        ]

    def read(self, index: int, rng: np.random.Generator) -> Sample | None:
        expressions = self.expressions(index)
        if not expressions:
            return None
        converse = self.conversing(index, rng)
        chosen = draw(expressions, self.conversations, rng)
        conversations = [converse(each) for each in chosen]
        image, masks = self.load(index, [each.targets for each in chosen])
        targets = (masks[:, None] == 1).astype(np.uint8)  # without a mask where the answer has no [SEG]
        wanted = [mask[: prompts.SEG in answer] for mask, (_, answer) in zip(targets, conversations)]
        return Sample(self.id(index), image, conversations, wanted)

    def __getitem__(self, index: int) -> EvalImage:
        """A photo with what is asked about it. Raises UserError, also for control tokens in a text."""
        with naming(self.id(index)):
            expressions, file_name = self.expressions(index)[: self.asked], self.file_name(index)
            if not expressions:
                raise UserError("it has no sentence")
            asked = [prompts.evaluation_prompt(each.text, each.is_sentence, self.lower) for each in expressions]
            check_texts(prompt.removeprefix(prompts.IMAGE_TAG) for prompt in asked)
        ids = [file_name + each.suffix for each in expressions]
        return EvalImage(
            image_id=file_name,
            expressions=expressions,
            unit_ids=[f"{id}#{ids[:k].count(id)}" if id in ids[:k] else id for k, id in enumerate(ids)],
            prompts=asked,
            load=partial(self.load, index, [each.targets for each in expressions]),
        )
