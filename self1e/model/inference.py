"""From a trained model to masks: `masks_of` a batch, and what users call on their own images, `segment` and `chat`.

`segment` gives the model the answer `[SEG].` and reads the mask in one forward pass; `chat` lets it write, causally,
and then needs a pass over the whole text, because image tokens look at the `[SEG]`s behind them.

Legend: H W pixels of the upright image, h w mask grid of the model, n masks of a conversation.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from self1e.errors import UserError
from self1e.model.photos import Photo, photo_of
from self1e.model.prompts import ANSWER, END_OF_TURN, IMAGE_TAG, check_prompt, evaluation_prompt, never_written

TEXT = "input_ids", "attention_mask", "row_image"
Conversation = str | Sequence[dict[str, Any]]


@dataclass(frozen=True)
class Reply:
    """What the model wrote, with one mask for every `[SEG]` in it, in order."""

    text: str  # without the closing token
    masks: np.ndarray = field(repr=False)  # bool (n, H, W)
    logits: np.ndarray = field(repr=False)  # float32 (n, h, w), before the resize
    scores: list[float | None]  # mean foreground probability over each mask, 0..1; None for an empty one


@dataclass(frozen=True)
class Segmentation:
    """The mask of one prompt, as one of a `Reply`: bool (H, W), logits (h, w)."""

    prompt: str
    text: str
    mask: np.ndarray = field(repr=False)
    logits: np.ndarray = field(repr=False)
    score: float | None


def reply_of(text: str, foreground: Tensor, logits: Tensor) -> Reply:
    """A text with the masks that `masks_of` found for it, each with its score."""
    inside = resized(logits, foreground.shape[1:]).sigmoid() * foreground
    means = (inside.sum((1, 2)) / foreground.sum((1, 2))).tolist()
    scores = [None if math.isnan(mean) else mean for mean in means]
    return Reply(text, foreground.cpu().numpy(), logits.cpu().numpy(), scores)


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
) -> list[tuple[Tensor, Tensor]]:
    """Predict the masks of every conversation of a batch, one for each `[SEG]` in it.

    Args:
        batch: what the processor returns, in host memory.
        sizes: (H, W) per image, of the masks.
        threshold: probability above which a pixel is foreground, 0..1 exclusive; 0.5 is logit 0.
        conversations_per_forward: of them in one pass; the images are encoded once for all.
        forwards: passes to run, the same number on every rank of ZeRO-3, whose ranks gather weights together; those
            beyond the batch's own repeat the last one, and their result is dropped. None: as many as there are.
        image_features: of `encode_images`, if the images of the batch are encoded already.

    Returns per conversation foreground, bool (n, H, W), and logits, float32 (n, h, w) before the resize, on the
    model's device. Raises FloatingPointError where the logits are not finite, UserError for a threshold not in 0..1.
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
        found = model(**inputs, image_features=image_features).mask_logits
        logits += [x.float() for x in found] if step < len(starts) else []
    check_finite(model, logits)
    wanted = [sizes[image] for image in batch["row_image"].tolist()]
    return [(resized(x, size) > cut, x) for x, size in zip(logits, wanted, strict=True)]


def logit_of(threshold: float) -> float:
    if not 0 < threshold < 1:
        raise UserError(f"threshold (--threshold) is {threshold}; expected a probability above 0 and below 1")
    return math.log(threshold / (1 - threshold))


def check_finite(model, logits: Sequence[Tensor]) -> None:
    if not all(torch.stack([x.isfinite().all() for x in logits]).tolist()):
        kind = model.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else model.dtype
        cause = "it overflows, use bfloat16 or float32" if dtype == torch.float16 else "check the weights"
        raise FloatingPointError(f"the mask logits are not finite in {dtype}: {cause}")


def resized(logits: Tensor, size: Sequence[int]) -> Tensor:
    """(n, h, w) -> (n, H, W), bilinear."""
    return interpolate(logits[:, None], tuple(size), mode="bilinear", align_corners=False)[:, 0]


class InferenceMixin:
    """`segment` and `chat` for `Self1EForSegmentation`."""

    def segment(
        self,
        processor,
        image: Photo,
        prompts: str | Sequence[str],
        *,
        is_sentence: bool | None = None,
        max_tiles: int = 1,
        **options: Any,
    ) -> list[Segmentation]:
        """One mask for every prompt, a text or several, by the evaluation protocol.

        >>> result = model.segment(processor, image, "the red circle")[0]
        >>> result.mask.shape == (image.height, image.width), result.mask.dtype
        (True, dtype('bool'))

        Args:
            image: a path, a PIL image of any mode, or a uint8 array (H, W, 3). EXIF orientation is applied; H and W
                are those of the result.
            is_sentence: prompts are sentences ("Which one rolls?") or phrases ("the ball", lower-cased); None: those
                that end like sentences are.
            max_tiles: 1, or 4 for high resolution (train with it too).
            options: `threshold` and `conversations_per_forward` of `masks_of`, whose errors are these too.

        Raises UserError: no trained head, an empty prompt, a control token in it, an image that cannot be read.
        """
        check_head(self)
        texts = [prompts] if isinstance(prompts, str) else [*prompts]
        for text in texts:
            check_prompt(text)
        photo = photo_of(image)
        if not texts:
            return []
        conversations = [[evaluation_prompt(text, is_sentence, lower=True), ANSWER] for text in texts]
        batch = processor([photo], [conversations], max_tiles=max_tiles)
        with evaluating(self):
            found = masks_of(self, batch, [(photo.height, photo.width)], **options)
        replies = [reply_of(ANSWER, *masks) for masks in found]
        return [Segmentation(x, y.text, y.masks[0], y.logits[0], y.scores[0]) for x, y in zip(texts, replies)]

    @torch.no_grad()
    def chat(
        self,
        processor,
        image: Photo,
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
        >>> replies = model.chat(processor, image, [question, turns], max_new_tokens=8)

        Args, besides those of `segment`, whose errors are these too:
            messages: a conversation about the image, or a list of them for a list of replies. One is a question, or a
                list of `{"role": "user" | "assistant", "content": text}` that starts and ends with the user; the image
                comes first by itself.
            max_new_tokens: length limit of an answer.
            generate_kwargs: of `generate`; the default is greedy decoding.
        """
        check_head(self)
        one = isinstance(messages, str) or not messages or isinstance(messages[0], Mapping)
        conversations = [conversation_turns(x) for x in ([messages] if one else messages)]
        photo, features = photo_of(image), None
        size, replies = (photo.height, photo.width), []
        with evaluating(self):
            for start in range(0, len(conversations), conversations_per_forward):
                part = conversations[start : start + conversations_per_forward]
                batch = processor([photo], [part], max_tiles=max_tiles, padding_side="left")
                features = features or self.encode_images(batch["pixel_values"].to(self.device), batch["tile_grids"])
                options = {"do_sample": False, "max_new_tokens": max_new_tokens, **generate_kwargs}
                answers, n_seg = self._write(processor.tokenizer, batch, features, options)
                found = [(torch.zeros(0, *size, dtype=torch.bool), torch.zeros(0, 1, 1))] * len(part)
                if any(n_seg):
                    found = masks_of(self, batch, [size], threshold=threshold, image_features=features)
                for answer, n, masks in zip(answers, n_seg, found):  # without the masks of earlier turns
                    replies.append(reply_of(answer, *(x[len(x) - n :] for x in masks)))
        return replies[0] if one else replies

    def _write(self, tokenizer, batch: dict, features, options: dict[str, Any]) -> tuple[list[str], list[int]]:
        """Let the model answer a left-padded batch, to which the answers are added; these, and their `[SEG]`s."""
        end = tokenizer.convert_tokens_to_ids(END_OF_TURN)
        ids = self.generate(
            **{name: batch[name].to(self.device) for name in TEXT},
            image_features=features,
            eos_token_id=end,
            pad_token_id=tokenizer.pad_token_id,
            suppress_tokens=never_written(tokenizer),
            **options,
        ).cpu()
        new = ids[:, batch["input_ids"].shape[1] :]
        written = (new == end).cumsum(1) == 0
        batch |= {"input_ids": ids, "attention_mask": torch.cat([batch["attention_mask"], written.long()], 1)}
        texts = [tokenizer.decode(answer[own], skip_special_tokens=False) for answer, own in zip(new, written)]
        return texts, ((new == self.config.seg_token_id) & written).sum(1).tolist()


def check_head(model) -> None:
    """Raise UserError for a base model that never learned to segment."""
    if not model.trained_head:
        name = model.config.name_or_path or "this model"
        raise UserError(f"{name} has no trained head: give trained weights (--model_weights, or weights=) or train it")


@contextmanager
def evaluating(model) -> Iterator[None]:
    """Dropout and stochastic depth off; the model's mode is as before afterwards."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


def conversation_turns(conversation: Conversation) -> list[str]:
    """Texts of a conversation, the image's tag in front: user, assistant, ..., user.

    Raises UserError for roles that do not alternate, and for a control token in a text of the user.
    """
    messages = [{"role": "user", "content": conversation}] if isinstance(conversation, str) else conversation
    roles = [message["role"] for message in messages]
    if roles != ["user", *["assistant", "user"] * (len(roles) // 2)]:
        raise UserError(f"the roles are {roles}; expected user, assistant, ..., user")
    texts = [message["content"] for message in messages]  # or the library's parts; the image is in front anyway
    texts = [x if isinstance(x, str) else "".join(y["text"] for y in x if y["type"] == "text") for x in texts]
    texts[0] = texts[0].removeprefix(IMAGE_TAG).removeprefix("\n")
    for text in texts[::2]:
        check_prompt(text)
    return [f"{IMAGE_TAG}\n{texts[0]}", *texts[1:]]
