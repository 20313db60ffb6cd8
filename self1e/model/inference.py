"""From a trained model to masks: `masks_of` a batch, and what users call on their own images, `segment` and `chat`.

An image is encoded once and shared by all its prompts. `segment` gives the model the answer `[SEG].` and reads the
mask (the evaluation protocol, one forward pass); `chat` lets it write, causally, and reads the masks of every `[SEG]`
it wrote in one more pass over the whole text, because image tokens look at `[SEG]`.

Legend: H W pixels of the upright image, h w mask grid of the model, n masks of a conversation.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate

from self1e.errors import UserError
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

Message = dict[str, str | list[dict[str, str]]]
Conversation = str | Sequence[Message]


@dataclass(frozen=True)
class Masks:
    """The masks of one conversation, one for each `[SEG]` in it.

    foreground: bool (n, H, W). logits: float32 (n, h, w), before the resize. Both on the model's device.
    """

    foreground: Tensor
    logits: Tensor

    @property
    def scores(self) -> list[float | None]:
        """Mean foreground probability over each mask, 0..1; None for an empty mask."""
        found = [
            (resized(grid, mask.shape).sigmoid() * mask).sum() / mask.sum()
            for grid, mask in zip(self.logits, self.foreground)
        ]
        return [None if math.isnan(x) else x for x in torch.stack(found).tolist()] if found else []


@dataclass(frozen=True)
class Segmentation:
    """The mask of one prompt.

    prompt: as given. text: the answer. mask: bool (H, W). logits: float32 (h, w), before the resize.
    score: mean foreground probability over the mask, 0..1; None for an empty mask.
    """

    prompt: str
    text: str
    mask: np.ndarray = field(repr=False)
    logits: np.ndarray = field(repr=False)
    score: float | None

    def as_reply(self) -> "Reply":
        """The same in the form of `chat`'s answers."""
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
        batch: what the processor returns, in host memory, padded on the right.
        sizes: (H, W) per image, of the masks.
        threshold: probability above which a pixel is foreground, 0..1 exclusive; 0.5 is logit 0.
        conversations_per_forward: of them in one pass; the images are encoded once for all.
        forwards: passes to run, the same number on every rank of ZeRO-3, whose ranks gather weights together; those
            beyond the batch's own repeat the last one, and their result is dropped. None: as many as there are.
        image_features: of `encode_images`, if the images of the batch are encoded already.

    Returns:
        One entry per conversation.

    Raises:
        FloatingPointError: mask logits are not finite.
    """
    cut, limit = logit_of(threshold), conversations_per_forward
    if image_features is None:
        pixels = batch["pixel_values"].to(model.device, non_blocking=True)
        image_features = model.encode_images(pixels, batch["tile_grids"])
    starts = range(0, len(batch["input_ids"]), limit)
    logits: list[Tensor] = []
    for step in range(len(starts) if forwards is None else forwards):
        start = starts[min(step, len(starts) - 1)]
        part = slice(start, start + limit)
        inputs = {name: batch[name][part] for name in ("input_ids", "attention_mask", "row_image")}
        packed = model.pack(**inputs, grids=image_features.grids)  # on the host, so that the GPU is not waited for
        found = model(packed=packed, image_features=image_features)
        logits += [x.float() for x in found.mask_logits] if step < len(starts) else []
    check_finite(model, logits)
    wanted = [sizes[image] for image in batch["row_image"].tolist()]
    return [Masks(foreground(x, size, cut), x) for x, size in zip(logits, wanted, strict=True)]


def check_finite(model, logits: Sequence[Tensor]) -> None:
    """Raise FloatingPointError unless all mask logits are numbers."""
    if logits and not bool(torch.stack([x.isfinite().all() for x in logits]).all()):
        cause = "it overflows, use bfloat16 or float32" if model.dtype == torch.float16 else "check the weights"
        raise FloatingPointError(f"the mask logits are not finite in {model.dtype}: {cause}")


def foreground(logits: Tensor, size: tuple[int, int], cut: float) -> Tensor:
    """Logits (n, h, w) -> bool (n, H, W), True above `cut`; one mask at a time is in memory as float."""
    masks = [resized(grid, size) > cut for grid in logits]
    return torch.stack(masks) if masks else torch.zeros(0, *size, dtype=torch.bool, device=logits.device)


def resized(grid: Tensor, size: Sequence[int]) -> Tensor:
    """(h, w) -> (H, W), bilinear."""
    return interpolate(grid[None, None], tuple(size), mode="bilinear", align_corners=False)[0, 0]


def logit_of(threshold: float) -> float:
    """The logit of a probability. Raises UserError for one outside 0..1."""
    if not 0 < threshold < 1:
        raise UserError(f"threshold (--threshold) is {threshold}; expected a probability above 0 and below 1")
    return math.log(threshold / (1 - threshold))


class InferenceMixin:
    """`segment` and `chat` for `Self1EForSegmentation`, which brings what is declared here."""

    config: Any
    device: Any
    dtype: Any
    trained_head: bool
    encode_images: Callable[..., Any]
    generate: Callable[..., Any]

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
        """One mask for every prompt, by the evaluation protocol.

        >>> result = model.segment(processor, image, "the red circle")[0]
        >>> result.mask.shape == (image.height, image.width), result.mask.dtype
        (True, dtype('bool'))
        >>> result.text
        '[SEG].'
        >>> both = model.segment(processor, image, ["the red circle", "Which of these shapes has no corners?"])
        >>> [mask.prompt for mask in both]
        ['the red circle', 'Which of these shapes has no corners?']
        >>> per_image = model.segment(processor, [image, image], [["the star"], ["the ring", "the cross"]])
        >>> [len(masks) for masks in per_image]
        [1, 2]

        Args:
            processor: the `Self1EProcessor` of the checkpoint.
            images: one or several; a path, a PIL image of any mode, or a uint8 array (H, W, 3). EXIF orientation is
                applied; H and W are those of the result.
            prompts: one or several, asked of every image; or, for several images, a list for each.
            is_sentence: ask with the prompt as a sentence ("Which one rolls?") or as a phrase ("the ball", which is
                lower-cased); None: a prompt that ends like a sentence is one.
            threshold: probability above which a pixel is foreground, 0..1 exclusive; 0.5 is logit 0.
            max_tiles: 1, or 4 for high resolution (train with it too).
            conversations_per_forward: prompts in one pass, and about as many for images encoded together.

        Returns:
            One result per prompt; for several images such a list each.

        Raises:
            UserError: no trained head, an empty prompt, a control token in it, a threshold outside 0..1, prompt lists
                that do not match the images, an image that is none or cannot be read.
            FloatingPointError: the model computed no numbers (float16 overflows).
        """
        single = isinstance(images, Photo)
        given: Any = [images] if single else images
        upright = [photo_of(image) for image in given]
        asked = prompts_per_image(prompts, len(upright))
        conversations = [[[question(text, is_sentence), ANSWER] for text in texts] for texts in asked]
        options: dict[str, Any] = {"threshold": threshold, "max_tiles": max_tiles, "limit": conversations_per_forward}
        results = [
            [Segmentation(text, x.text, x.masks[0], x.logits[0], x.scores[0]) for text, x in zip(texts, replies)]
            for texts, replies in zip(asked, self._replies(processor, upright, conversations, **options))
        ]
        return results[0] if single else results

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
        >>> [reply.masks.shape[1:] == (image.height, image.width) for reply in replies]
        [True, True]

        Args:
            processor, images, threshold, max_tiles: as in `segment`. An image that occurs several times (the same
                object) is encoded once for the conversations that are generated together.
            messages: a question, or a list of `{"role": "user" | "assistant", "content": text}` that starts and ends
                with the user; several images take one such conversation each. The image comes first by itself.
            max_new_tokens: length limit of the answer.
            conversations_per_forward: of them generated together.
            generate_kwargs: of `generate`; the default is greedy decoding.

        Returns:
            The reply; for several images a list.

        Raises:
            UserError: no trained head, a control token in a text of the user, roles that do not alternate.
            FloatingPointError: the model computed no numbers (float16 overflows).
        """
        single = isinstance(images, Photo)
        given: list[Any] = [images] if single else list(cast(Sequence[Photo], images))
        conversations = [messages] if single else list(messages)
        if isinstance(messages, str) > single or len(conversations) != len(given):
            raise UserError(f"{len(given)} images need as many conversations, in a list")
        asked: dict[int, list[list[str]]] = {}  # by image
        for image, conversation in zip(given, conversations):
            asked.setdefault(id(image), []).append(conversation_turns(cast(Conversation, conversation)))
        upright = {id(image): photo_of(image) for image in given}
        options: dict[str, Any] = {"threshold": threshold, "max_tiles": max_tiles, "limit": conversations_per_forward}
        options["generate"] = {"do_sample": False, "max_new_tokens": max_new_tokens, **generate_kwargs}
        replies = self._replies(processor, [*upright.values()], [*asked.values()], **options)
        following = {key: iter(found) for key, found in zip(asked, replies)}
        results = [next(following[id(image)]) for image in given]
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
    ) -> list[list[Reply]]:
        """Per photo a reply to each of its conversations, `limit` of them at a time.

        Without `generate`, the options of the method of this name, the last text of each conversation is the reply.
        """
        check_head(self)
        logit_of(threshold)
        replies = []
        with evaluating(self):
            for part in image_groups([len(x) for x in conversations], limit):
                side = "right" if generate is None else "left"
                batch = processor(photos[part], conversations[part], max_tiles=max_tiles, padding_side=side)
                pixels = batch["pixel_values"].to(self.device, non_blocking=True)
                features = self.encode_images(pixels, batch["tile_grids"])
                texts = [turns[-1] for x in conversations[part] for turns in x]
                earlier = torch.zeros(len(texts), dtype=torch.long)
                if generate is not None:
                    earlier = self._count_seg(batch)
                    texts = self._write(processor.tokenizer, batch, features, limit, generate)
                own = self._count_seg(batch) - earlier  # an answer without any takes no pass for masks
                chosen = own.nonzero()[:, 0]
                inputs = {name: batch[name][chosen] for name in ("input_ids", "attention_mask", "row_image")}
                sizes = [(image.height, image.width) for image in photos[part]]
                options: dict[str, Any] = {"threshold": threshold, "conversations_per_forward": limit}
                found = masks_of(self, inputs, sizes, image_features=features, **options) if len(chosen) else []
                masks = dict(zip(chosen.tolist(), found))
                for number, (text, image) in enumerate(zip(texts, batch["row_image"].tolist())):
                    none = Masks(torch.zeros(0, *sizes[image], dtype=torch.bool), torch.zeros(0, 0, 0))
                    x, n = masks.get(number, none), int(own[number])
                    x = Masks(x.foreground[len(x.foreground) - n :], x.logits[len(x.logits) - n :])
                    replies.append(Reply(text, x.foreground.cpu().numpy(), x.logits.cpu().numpy(), x.scores))
        following = iter(replies)
        return [[next(following) for _ in x] for x in conversations]

    def _count_seg(self, batch: dict) -> Tensor:
        """`[SEG]`s in each conversation of a batch, (R,)."""
        return (batch["input_ids"] == self.config.seg_token_id).sum(1)

    def _write(self, tokenizer, batch: dict, features, limit: int, options: dict[str, Any]) -> list[str]:
        """Let the model answer the conversations of a left-padded batch, which then holds the answers, too."""
        end, texts, whole = tokenizer.convert_tokens_to_ids(END_OF_TURN), [], []
        for start in range(0, len(batch["input_ids"]), limit):
            names = ("input_ids", "attention_mask", "row_image")
            inputs = {name: batch[name][start : start + limit].to(self.device) for name in names}
            generated = self.generate(
                **inputs,
                image_features=features,
                eos_token_id=end,
                pad_token_id=tokenizer.pad_token_id,
                suppress_tokens=[self.config.image_token_id],  # no image belongs to one that the model writes
                **options,
            )
            new = generated[:, inputs["input_ids"].shape[1] :].tolist()
            answers = [ids[: ids.index(end)] if end in ids else ids for ids in new]
            texts += [tokenizer.decode(answer, skip_special_tokens=False) for answer in answers]
            prompts = zip(inputs["input_ids"], inputs["attention_mask"].bool())
            whole += [ids[present].tolist() + answer for (ids, present), answer in zip(prompts, answers)]
        padded = tokenizer.pad({"input_ids": whole}, padding_side="right")
        batch |= {name: torch.tensor(padded[name]) for name in ("input_ids", "attention_mask")}
        return texts

    def prepare_inputs_for_generation(self, *args, image_features=None, is_first_iteration: bool = False, **kwargs):
        """As the library's; images that are encoded already enter with the prompt and are then in the cache."""
        library: Any = super()
        inputs = library.prepare_inputs_for_generation(*args, is_first_iteration=is_first_iteration, **kwargs)
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


def prompts_per_image(prompts, images: int) -> list[list[str]]:
    """A list of prompts for each image."""
    prompts = [prompts] if isinstance(prompts, str) else list(prompts)
    if all(isinstance(prompt, str) for prompt in prompts):
        return [prompts] * images
    if len(prompts) != images or any(isinstance(texts, str) for texts in prompts):
        raise UserError(
            f"{len(prompts)} lists of prompts for {images} images: give one per image, or one list for all"
        )
    return [list(texts) for texts in prompts]


def question(prompt: str, is_sentence: bool | None) -> str:
    """The fixed question of evaluation about a prompt."""
    check_prompt(prompt)
    return evaluation_prompt(prompt, looks_like_sentence(prompt) if is_sentence is None else is_sentence, lower=True)


def conversation_turns(conversation: Conversation) -> list[str]:
    """Texts of a conversation, the image's tag in front: user, assistant, ..., user.

    Raises UserError for roles that do not alternate, and for a control token in a text of the user.
    """
    alone = isinstance(conversation, str)
    messages: list[Any] = [{"role": "user", "content": conversation}] if alone else list(conversation)
    roles = [message.get("role") for message in messages]
    if roles != ["assistant" if index % 2 else "user" for index in range(len(roles))] or len(roles) % 2 == 0:
        raise UserError(
            f"the roles are {roles}; expected user, assistant, ..., user (the system sentence is part of the weights)"
        )
    texts = []
    for index, message in enumerate(messages):
        content = message["content"]
        if not isinstance(content, str):  # the library's parts; the image is in front anyway
            content = "".join(part["text"] for part in content if part["type"] == "text")
        if index == 0:
            content = content.removeprefix(IMAGE_TAG).removeprefix("\n")
        check_prompt(content.replace(SEG, "it") if index % 2 else content)
        texts.append(content)
    return [f"{IMAGE_TAG}\n{texts[0]}", *texts[1:]]


def image_groups(counts: Sequence[int], limit: int) -> Iterator[slice]:
    """Slices of neighbouring images with at most `limit` conversations together, but at least one image with some."""
    if limit < 1:
        raise UserError(f"conversations_per_forward (--batch_size) is {limit}; it must be at least 1")
    start = conversations = 0
    for stop, count in enumerate(counts):
        if conversations and conversations + count > limit:
            yield slice(start, stop)
            start, conversations = stop, 0
        conversations += count
    if conversations:
        yield slice(start, len(counts))
