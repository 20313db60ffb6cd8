"""From a trained model to masks: `masks_of` a batch, and what users call on their own images, `segment` and `chat`.

`segment` gives the model the answer `[SEG].` and reads the mask (the evaluation protocol, one forward pass); `chat`
lets it write, causally, and reads the masks of every `[SEG]` it wrote in one more pass over the whole text, because
image tokens look at `[SEG]`.

Legend: H W pixels of the upright image, h w mask grid of the model, n masks of a conversation.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate

from self1e.errors import UserError
from self1e.model.batch import pack
from self1e.model.photos import Photo, photo_of
from self1e.model.prompts import (
    ANSWER,
    END_OF_TURN,
    IMAGE_TAG,
    SEG,
    check_prompt,
    evaluation_prompt,
    looks_like_sentence,
)

TEXT = "input_ids", "attention_mask", "row_image"
Conversation = str | Sequence[dict[str, Any]]


class Masks(NamedTuple):
    """The masks of one conversation, one for each `[SEG]` in it, on the model's device."""

    foreground: Tensor  # bool (n, H, W)
    logits: Tensor  # float32 (n, h, w), before the resize

    @property
    def scores(self) -> list[float | None]:
        """Mean foreground probability over each mask, 0..1; None for an empty mask."""
        inside = resized(self.logits, self.foreground.shape[1:]).sigmoid() * self.foreground
        means = inside.sum((1, 2)) / self.foreground.sum((1, 2))
        return [None if math.isnan(x) else x for x in means.tolist()]


@dataclass(frozen=True)
class Segmentation:
    """The mask of one prompt: `Reply` for one mask, with the prompt as given. mask: bool (H, W). logits: (h, w)."""

    prompt: str
    text: str
    mask: np.ndarray = field(repr=False)
    logits: np.ndarray = field(repr=False)
    score: float | None

    def as_reply(self) -> "Reply":
        return Reply(self.text, self.mask[None], self.logits[None], [self.score])


@dataclass(frozen=True)
class Reply:
    """What the model wrote, with one mask for every `[SEG]` in it, in order.

    text: without the closing token. masks: bool (n, H, W). logits: float32 (n, h, w), before the resize.
    scores: mean foreground probability over each mask, 0..1; None for an empty one.
    """

    text: str
    masks: np.ndarray = field(repr=False)
    logits: np.ndarray = field(repr=False)
    scores: list[float | None]


@torch.no_grad()
def masks_of(
    model,
    batch: Mapping[str, Tensor],
    sizes: Sequence[tuple[int, int]],
    *,
    threshold: float = 0.5,
    conversations_per_forward: int = 16,
    forwards: int | None = None,
    image_features=None,
) -> list[Masks]:
    """Predict the masks of every conversation of a batch.

    Args:
        batch: what the processor returns, in host memory.
        sizes: (H, W) per image, of the masks.
        threshold: probability above which a pixel is foreground, 0..1 exclusive; 0.5 is logit 0.
        conversations_per_forward: of them in one pass; the images are encoded once for all.
        forwards: passes to run, the same number on every rank of ZeRO-3, whose ranks gather weights together; those
            beyond the batch's own repeat the last one, and their result is dropped. None: as many as there are.
        image_features: of `encode_images`, if the images of the batch are encoded already.

    Raises FloatingPointError where mask logits are not finite, and UserError for a threshold outside 0..1.
    """
    cut = logit_of(threshold)
    if image_features is None:
        pixels = batch["pixel_values"].to(model.device, non_blocking=True)
        image_features = model.encode_images(pixels, batch["tile_grids"])
    limit, logits = conversations_per_forward, []
    starts = range(0, len(batch["input_ids"]), limit)
    for step in range(len(starts) if forwards is None else forwards):
        start = starts[min(step, len(starts) - 1)]
        inputs = {name: batch[name][start : start + limit] for name in TEXT}
        packed = pack(**inputs, grids=image_features.grids, tokens=model.config, groups=model.most_groups)
        found = model(packed=packed, image_features=image_features)
        logits += [x.float() for x in found.mask_logits] if step < len(starts) else []
    check_finite(model, logits)
    wanted = [sizes[image] for image in batch["row_image"].tolist()]
    return [Masks(resized(x, size) > cut, x) for x, size in zip(logits, wanted, strict=True)]


def logit_of(threshold: float) -> float:
    if not 0 < threshold < 1:
        raise UserError(f"threshold (--threshold) is {threshold}; expected a probability above 0 and below 1")
    return math.log(threshold / (1 - threshold))


def check_finite(model, logits: Sequence[Tensor]) -> None:
    if not all(torch.stack([x.isfinite().all() for x in logits]).tolist()):
        cause = "it overflows, use bfloat16 or float32" if model.dtype == torch.float16 else "check the weights"
        raise FloatingPointError(f"the mask logits are not finite in {model.dtype}: {cause}")


def resized(logits: Tensor, size: Sequence[int]) -> Tensor:
    """(n, h, w) -> (n, H, W), bilinear."""
    return interpolate(logits[:, None], tuple(size), mode="bilinear", align_corners=False)[:, 0]


class InferenceMixin:
    """`segment` and `chat` for `Self1EForSegmentation`."""

    def segment(
        self,
        processor,
        images: Photo | Sequence[Photo],
        prompts: str | Sequence[str] | Sequence[Sequence[str]],
        *,
        is_sentence: bool | None = None,
        threshold: float = 0.5,
        max_tiles: int = 1,
        conversations_per_forward: int = 16,
    ) -> list[Segmentation] | list[list[Segmentation]]:
        """One mask for every prompt, by the evaluation protocol: a list, for several images one list each.

        >>> result = model.segment(processor, image, "the red circle")[0]
        >>> result.mask.shape == (image.height, image.width), result.mask.dtype
        (True, dtype('bool'))
        >>> per_image = model.segment(processor, [image, image], [["the star"], ["the ring", "the cross"]])
        >>> [len(masks) for masks in per_image]
        [1, 2]

        Args:
            images: one or several; a path, a PIL image of any mode, or a uint8 array (H, W, 3). EXIF orientation is
                applied; H and W are those of the result.
            prompts: one or several, asked of every image; or, for several images, a list for each.
            is_sentence: a prompt is a sentence ("Which one rolls?") or a phrase ("the ball", which is lower-cased);
                None: it is a sentence if it ends like one.
            threshold: probability above which a pixel is foreground, 0..1 exclusive.
            max_tiles: 1, or 4 for high resolution (train with it too).
            conversations_per_forward: prompts in one pass.

        Raises UserError (no trained head, an empty prompt, a control token in it, an image that cannot be read), and
        what `masks_of` raises.
        """
        given: Any = [images] if isinstance(images, Photo) else images
        asked: list = [prompts] if isinstance(prompts, str) else list(prompts)
        if all(isinstance(prompt, str) for prompt in asked):
            asked = [asked] * len(given)
        if len(asked) != len(given):
            raise UserError(
                f"{len(asked)} lists of prompts for {len(given)} images: give one for each, or one for all"
            )
        photos = [photo_of(image) for image in given]
        conversations = [[[question(prompt, is_sentence), ANSWER] for prompt in texts] for texts in asked]
        limits: dict[str, Any] = {"max_tiles": max_tiles, "limit": conversations_per_forward}
        with evaluating(self):
            replies = iter(self._replies(processor, photos, conversations, threshold=threshold, **limits))
        results = [
            [Segmentation(prompt, x.text, x.masks[0], x.logits[0], x.scores[0]) for prompt, x in zip(texts, replies)]
            for texts in asked
        ]
        return results[0] if isinstance(images, Photo) else results

    def chat(
        self,
        processor,
        images: Photo | Sequence[Photo],
        messages: Conversation | Sequence[Conversation],
        *,
        max_new_tokens: int = 256,
        threshold: float = 0.5,
        max_tiles: int = 1,
        conversations_per_forward: int = 8,
        **generate_kwargs,
    ) -> Reply | list[Reply]:
        """Let the model answer, and read one mask for every `[SEG]` it writes (none: no mask).

        >>> question = "Can you segment the red circle in this image?"
        >>> reply = model.chat(processor, image, question, max_new_tokens=8)
        >>> len(reply.masks) == reply.text.count("[SEG]")
        True
        >>> turns = [{"role": "user", "content": question}, {"role": "assistant", "content": "It is [SEG]."},
        ...          {"role": "user", "content": "What is left of it?"}]
        >>> replies = model.chat(processor, [image, image], [question, turns], max_new_tokens=8)

        Args, besides those of `segment`, whose errors are these too:
            messages: a question, or a list of `{"role": "user" | "assistant", "content": text}` that starts and ends
                with the user; several images take one such conversation each. The image comes first by itself.
            max_new_tokens: length limit of the answer.
            generate_kwargs: of `generate`; the default is greedy decoding.
        """
        single = isinstance(images, Photo)
        given: Any = [images] if single else images
        conversations: Any = [messages] if single else messages
        if isinstance(messages, str) > single or len(conversations) != len(given):
            raise UserError(f"{len(given)} images need as many conversations, in a list")
        asked: dict[int, list[list[str]]] = {}  # by image, of which one object may have several conversations
        for image, conversation in zip(given, conversations):
            asked.setdefault(id(image), []).append(conversation_turns(conversation))
        photos = [photo_of(image) for image in {id(image): image for image in given}.values()]
        options: dict[str, Any] = {"threshold": threshold, "max_tiles": max_tiles, "limit": conversations_per_forward}
        options["generate"] = {"do_sample": False, "max_new_tokens": max_new_tokens, **generate_kwargs}
        with evaluating(self):
            replies = iter(self._replies(processor, photos, [*asked.values()], **options))
        by_image = {key: [next(replies) for _ in own] for key, own in asked.items()}
        results = [by_image[id(image)].pop(0) for image in given]
        return results[0] if single else results

    @torch.no_grad()
    def _replies(
        self,
        processor,
        photos: Sequence[Image.Image],
        conversations: Sequence[Sequence[list[str]]],
        *,
        threshold: float,
        max_tiles: int,
        limit: int,
        generate: dict[str, Any] | None = None,
    ) -> list[Reply]:
        """The replies to the conversations of all photos in order, `limit` of them at a time.

        Without `generate`, the options of the method of this name, the last text of each conversation is the reply.
        """
        check_head(self)
        pairs = [(number, turns) for number, own in enumerate(conversations) for turns in own]
        replies = []
        for start in range(0, len(pairs), limit):
            part = pairs[start : start + limit]
            numbers = list(dict.fromkeys(number for number, _ in part))
            images = [photos[number] for number in numbers]
            texts = [[turns for number, turns in part if number == own] for own in numbers]
            side = "right" if generate is None else "left"
            batch = processor(images, texts, max_tiles=max_tiles, padding_side=side)
            features = self.encode_images(batch["pixel_values"].to(self.device), batch["tile_grids"])
            answers, n_seg = [turns[-1] for _, turns in part], torch.ones(len(part), dtype=torch.long)
            if generate is not None:
                answers, n_seg = self._write(processor.tokenizer, batch, features, generate)
            sizes = [(image.height, image.width) for image in images]
            options: dict[str, Any] = {"threshold": threshold, "conversations_per_forward": limit}
            found: Any = [None] * len(part)
            if n_seg.any():
                found = masks_of(self, batch, sizes, image_features=features, **options)
            for answer, n, masks, image in zip(answers, n_seg.tolist(), found, batch["row_image"].tolist()):
                own = Masks(torch.zeros(0, *sizes[image], dtype=torch.bool), torch.zeros(0, 1, 1))
                if n:
                    own = Masks(*(x[len(x) - n :] for x in masks))  # not those of earlier turns
                replies.append(Reply(answer, own.foreground.cpu().numpy(), own.logits.cpu().numpy(), own.scores))
        return replies

    def _write(self, tokenizer, batch: dict, features, options: dict[str, Any]) -> tuple[list[str], Tensor]:
        """Let the model answer a left-padded batch, to which the answers are added; these, and their `[SEG]`s."""
        end = tokenizer.convert_tokens_to_ids(END_OF_TURN)
        ids = self.generate(
            **{name: batch[name].to(self.device) for name in TEXT},
            image_features=features,
            eos_token_id=end,
            pad_token_id=tokenizer.pad_token_id,
            suppress_tokens=[self.config.image_token_id],  # no image belongs to one that the model writes
            **options,
        ).cpu()
        new = ids[:, batch["input_ids"].shape[1] :]
        written = (new == end).cumsum(1) == 0
        batch |= {"input_ids": ids, "attention_mask": torch.cat([batch["attention_mask"], written.long()], 1)}
        texts = [tokenizer.decode(answer[own], skip_special_tokens=False) for answer, own in zip(new, written)]
        return texts, ((new == self.config.seg_token_id) & written).sum(1)

    def prepare_inputs_for_generation(self, *args, image_features=None, is_first_iteration: bool = False, **kwargs):
        """As the library's; images that are encoded already enter with the prompt and are then in the cache."""
        inputs = super().prepare_inputs_for_generation(*args, is_first_iteration=is_first_iteration, **kwargs)
        needed = is_first_iteration or not kwargs.get("use_cache", True)
        return inputs | {"image_features": image_features if needed else None}


def check_head(model) -> None:
    """Raise UserError for a base model that never learned to segment."""
    if not model.trained_head:
        raise UserError(
            f"{model.config.name_or_path or 'this model'} is a base model without a trained segmentation head: "
            "give trained weights (weights= in from_pretrained, --model_weights on a command line) or train it"
        )


@contextmanager
def evaluating(model) -> Iterator[None]:
    """Dropout and stochastic depth off; the model's mode is as before afterwards."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


def question(prompt: str, is_sentence: bool | None) -> str:
    """The fixed question of evaluation about a prompt."""
    check_prompt(prompt)
    return evaluation_prompt(prompt, looks_like_sentence(prompt) if is_sentence is None else is_sentence, lower=True)


def conversation_turns(conversation: Conversation) -> list[str]:
    """Texts of a conversation, the image's tag in front: user, assistant, ..., user.

    Raises UserError for roles that do not alternate, and for a control token in a text of the user.
    """
    messages = [{"role": "user", "content": conversation}] if isinstance(conversation, str) else conversation
    roles = [message["role"] for message in messages]
    if roles != ["assistant" if index % 2 else "user" for index in range(len(roles))] or len(roles) % 2 == 0:
        raise UserError(
            f"the roles are {roles}; expected user, assistant, ..., user (the system sentence is part of the weights)"
        )
    texts = [message["content"] for message in messages]  # or the library's parts; the image is in front anyway
    texts = [x if isinstance(x, str) else "".join(y["text"] for y in x if y["type"] == "text") for x in texts]
    texts[0] = texts[0].removeprefix(IMAGE_TAG).removeprefix("\n")
    for index, text in enumerate(texts):
        check_prompt(text.replace(SEG, "it") if index % 2 else text)
    return [f"{IMAGE_TAG}\n{texts[0]}", *texts[1:]]
