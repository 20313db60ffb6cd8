"""What users call on a photo of theirs: `model.segment` and `model.chat`.

A photo is encoded once and shared by all its prompts. `segment` gives the model the answer `[SEG].` and reads the mask
(the evaluation protocol, one forward pass); `chat` lets it write, causally, and reads the masks of every `[SEG]` it
wrote in one more pass over the whole text, because image tokens look at `[SEG]`.

Legend: H W pixels of the upright photo, h w mask grid of the model, n masks of a reply.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate

from self1e.model.photos import as_rgb
from self1e.model.prompts import (
    ANSWER,
    END_OF_TURN,
    IMAGE_TAG,
    SEG,
    check_prompt,
    evaluation_prompt,
    looks_like_sentence,
)
from self1e.model.results import Reply, Segmentation, logit_of, to_masks

Message = dict[str, str | list[dict[str, str]]]
Conversation = str | Sequence[Message]


class InferenceMixin:
    """`segment` and `chat` for `Self1EForSegmentation`, which brings what is declared here."""

    config: Any
    device: Any
    dtype: Any
    trained_head: bool
    encode_images: Callable[..., Any]
    generate: Callable[..., Any]
    layout_of: Callable[..., Any]
    __call__: Callable[..., Any]

    @torch.no_grad()
    def segment(
        self,
        processor,
        images: Image.Image | Sequence[Image.Image],
        prompts: str | Sequence[str] | Sequence[Sequence[str]],
        *,
        is_sentence: bool | None = None,
        threshold: float = 0.5,
        max_tiles: int = 1,
        rows_per_forward: int = 16,
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
        >>> per_photo = model.segment(processor, [image, image], [["the star"], ["the ring", "the cross"]])
        >>> [len(masks) for masks in per_photo]
        [1, 2]

        Args:
            processor: the `Self1EProcessor` of the checkpoint.
            images: one photo or several, of any mode; EXIF orientation is applied, H and W are those of the result.
            prompts: one or several, asked of every photo; or, for several photos, a list for each.
            is_sentence: ask with the prompt as a sentence ("Which one rolls?") or as a phrase ("the ball", which is
                lower-cased); None: a prompt that ends like a sentence is one.
            threshold: probability above which a pixel is foreground, 0..1 exclusive; 0.5 is logit 0.
            max_tiles: 1, or 4 for high resolution (train with it too).
            rows_per_forward: prompts in one pass, and photos encoded together.

        Returns:
            One result per prompt; for several photos such a list each.

        Raises:
            ValueError: no trained head, an empty prompt, a reserved token in it, a threshold outside 0..1, prompt
                lists that do not match the photos.
            FloatingPointError: the model computed no numbers (float16 overflows).
        """
        self._check_head()
        cut = logit_of(threshold)
        photos, single = _photos(images)
        asked = _prompts_per_photo(prompts, len(photos))
        rows = [[[_question(text, is_sentence), ANSWER] for text in texts] for texts in asked]
        logits = []
        with _evaluating(self):
            for features, batch in self._batches(processor, photos, rows, max_tiles, rows_per_forward):
                logits += self._finite(self._masks(features, batch))
        found = iter(logits)
        results: list[list[Segmentation]] = []
        for photo, texts in zip(photos, asked):
            results.append([])
            for text in texts:
                masks, scores, grids = to_masks(next(found), (photo.height, photo.width), cut)
                results[-1].append(Segmentation(text, ANSWER, masks[0], grids[0], scores[0]))
        return results[0] if single else results

    @torch.no_grad()
    def chat(
        self,
        processor,
        images: Image.Image | Sequence[Image.Image],
        messages: Conversation | Sequence[Conversation],
        *,
        max_new_tokens: int = 256,
        threshold: float = 0.5,
        max_tiles: int = 1,
        rows_per_forward: int = 8,
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
            processor, images, threshold, max_tiles: as in `segment`. A photo that occurs several times in `images`
                (the same object) is encoded once.
            messages: a question, or a list of `{"role": "user" | "assistant", "content": text}` that starts and ends
                with the user; several photos take one such conversation each. The photo comes first by itself.
            max_new_tokens: length limit of the answer.
            rows_per_forward: conversations generated together.
            generate_kwargs: of `generate`; the default is greedy decoding.

        Returns:
            The reply; for several photos a list.

        Raises:
            ValueError: no trained head, a reserved token in a text of the user, roles that do not alternate.
            FloatingPointError: the model computed no numbers (float16 overflows).
        """
        self._check_head()
        cut = logit_of(threshold)
        given, single = _photos(images, keep=True)
        conversations = [messages] if single else list(messages)
        if isinstance(messages, str) > single or len(conversations) != len(given):
            raise ValueError(f"{len(given)} photos need as many conversations, in a list")
        rows: dict[int, list[list[str]]] = {}  # photo -> its conversations
        for image, conversation in zip(given, conversations):
            rows.setdefault(id(image), []).append(conversation_turns(cast(Conversation, conversation)))
        photos = {id(image): as_rgb(image) for image in given}
        options = {"do_sample": False, "max_new_tokens": max_new_tokens, **generate_kwargs}
        replies = []
        with _evaluating(self):
            for features, batch in self._batches(
                processor, list(photos.values()), list(rows.values()), max_tiles, rows_per_forward, padding_side="left"
            ):
                replies += self._write(processor, features, batch, options)
        ordered = iter(replies)
        found = {key: [next(ordered) for _ in texts] for key, texts in rows.items()}
        results = []
        for image in given:
            text, logits = found[id(image)].pop(0)
            size = (photos[id(image)].height, photos[id(image)].width)
            masks, scores, grids = to_masks(logits, size, cut)
            results.append(Reply(text, masks, grids, scores))
        return results[0] if single else results

    def prepare_inputs_for_generation(self, *args, image_features=None, is_first_iteration: bool = False, **kwargs):
        """As the library's; photos that are encoded already enter with the prompt and are then in the cache."""
        library: Any = super()
        inputs = library.prepare_inputs_for_generation(*args, is_first_iteration=is_first_iteration, **kwargs)
        return inputs | {"image_features": image_features if is_first_iteration else None}

    def _check_head(self) -> None:
        if not self.trained_head:
            raise ValueError(
                f"{self.config.name_or_path or 'this model'} is a base model without a trained segmentation head: "
                "give trained weights (weights= in from_pretrained, --model_weights on a command line) or train it"
            )

    def _batches(
        self, processor, photos, rows, max_tiles: int, rows_per_forward: int, padding_side: str = "right"
    ) -> Iterator[tuple]:
        """Encoded photos, at most `rows_per_forward` of their rows at a time: (features, texts in host memory)."""
        for group in _groups([len(texts) for texts in rows], rows_per_forward):
            batch = processor(
                images=photos[group], conversations=rows[group], max_tiles=max_tiles, padding_side=padding_side
            )
            pixels = batch["pixel_values"].to(self.device, non_blocking=True)
            features = self.encode_images(pixels, batch["tile_grids"])
            for start in range(0, len(batch["input_ids"]), rows_per_forward):
                part = slice(start, start + rows_per_forward)
                filled = batch["attention_mask"][part].any(0)  # columns that are not padding in every row
                inputs = {name: batch[name][part][:, filled] for name in ("input_ids", "attention_mask")}
                yield features, inputs | {"row_image": batch["row_image"][part]}

    def _masks(self, features, inputs: dict[str, Tensor]) -> list[Tensor]:
        """Mask logits per row (n_seg, h, w) of a batch in host memory, which is read there: the GPU is not waited for.

        features: of `encode_images`. inputs: `input_ids`, `attention_mask` and `row_image`.
        """
        inputs = {name: value.cpu() for name, value in inputs.items()}
        layout = self.layout_of(None, **inputs, labels=None, grids=features.grids, whole=False)
        ids = inputs.pop("input_ids").to(self.device, non_blocking=True)
        return self(input_ids=ids, layout=layout, **inputs, image_features=features).mask_logits

    def _finite(self, logits: list[Tensor]) -> list[Tensor]:
        """The logits in float32. Raises FloatingPointError where they are not finite."""
        logits = [row.float() for row in logits]
        if logits and not bool(torch.stack([row.isfinite().all() for row in logits]).all()):
            raise FloatingPointError(
                "the mask logits are not finite: float16 overflows, load the model in bfloat16 or float32"
                if self.dtype == torch.float16
                else f"the mask logits are not finite in {self.dtype}, whose range is wide enough: the weights or the "
                "picture hold NaN or infinity; check the checkpoint"
            )
        return logits

    def _write(self, processor, features, inputs: dict[str, Tensor], options: dict) -> list[tuple[str, Tensor]]:
        """Generate the rows of a left-padded batch: each one's text and the mask logits (n, h, w) of its `[SEG]`s."""
        tokenizer = processor.tokenizer
        end = tokenizer.convert_tokens_to_ids(END_OF_TURN)
        moved = {name: value.to(self.device) for name, value in inputs.items()}
        generated = self.generate(
            **moved,
            image_features=features,
            eos_token_id=end,
            pad_token_id=tokenizer.pad_token_id,
            suppress_tokens=[self.config.image_token_id],  # no picture belongs to one that the model writes
            **options,
        )
        texts, answers, whole = [], [], []
        length = inputs["input_ids"].shape[1]
        for prompt, filled, new in zip(
            inputs["input_ids"], inputs["attention_mask"].bool(), generated[:, length:].tolist()
        ):
            answer = new[: new.index(end)] if end in new else new
            texts.append(tokenizer.decode(answer, skip_special_tokens=False))
            answers.append(answer.count(self.config.seg_token_id))
            whole.append(prompt[filled].tolist() + answer)
        logits = [torch.zeros(0, 0, 0)] * len(texts)
        chosen = [row for row, count in enumerate(answers) if count]
        if chosen:
            ids = {"input_ids": [whole[row] for row in chosen]}
            again = tokenizer.pad(ids, padding_side="right", return_tensors="pt")
            photos = inputs["row_image"][chosen]
            found = self._masks(features, {**again, "row_image": photos})
            for row, masks in zip(chosen, self._finite(found)):
                logits[row] = masks[-answers[row] :]  # those of earlier turns come first
        return list(zip(texts, logits))


def predict_photo(
    model, batch: Mapping[str, Tensor], size: tuple[int, int], *, rows_per_forward: int, forwards: int
) -> Tensor:
    """Foreground of all rows of one photo: bool (rows, H, W) on the model's device.

    Args:
        batch: the processor's output for the photo, in host memory.
        size: (H, W) of the masks.
        forwards: passes to run; those beyond the photo's rows repeat the last one, and their result is dropped.
    """
    pixels = batch["pixel_values"].to(model.device, non_blocking=True)
    features = model.encode_images(pixels, batch["tile_grids"])
    masks: list[Tensor] = []
    starts = range(0, len(batch["input_ids"]), rows_per_forward)
    for step in range(forwards):
        start = starts[min(step, len(starts) - 1)]
        names = ("input_ids", "attention_mask", "row_image")
        rows = {name: batch[name][start : start + rows_per_forward] for name in names}
        logits = [row[-1] for row in model._masks(features, rows)]  # the answer's [SEG] is the last of its row
        if step < len(starts):
            full = (interpolate(x.float()[None, None], size, mode="bilinear", align_corners=False) for x in logits)
            masks += [x[0, 0] > 0 for x in full]
    return torch.stack(masks)


@contextmanager
def _evaluating(model):
    """Dropout and stochastic depth off; the model's mode is as before afterwards."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


def _photos(images, *, keep: bool = False) -> tuple[list[Image.Image], bool]:
    """The photos as a list, upright unless `keep`, and whether there was just one outside a list."""
    single = isinstance(images, Image.Image)
    photos = [images] if single else list(images)
    wrong = [type(photo).__name__ for photo in photos if not isinstance(photo, Image.Image)]
    if wrong:
        raise ValueError(f"images must be PIL.Image.Image, found {wrong[0]}: open a file with PIL.Image.open")
    return photos if keep else [as_rgb(photo) for photo in photos], single


def _prompts_per_photo(prompts, photos: int) -> list[list[str]]:
    prompts = [prompts] if isinstance(prompts, str) else list(prompts)
    if all(isinstance(prompt, str) for prompt in prompts):
        return [prompts] * photos
    if len(prompts) != photos or any(isinstance(texts, str) for texts in prompts):
        raise ValueError(
            f"{len(prompts)} lists of prompts for {photos} photos: give one per photo, or one list for all"
        )
    return [list(texts) for texts in prompts]


def _question(prompt: str, is_sentence: bool | None) -> str:
    check_prompt(prompt)
    return evaluation_prompt(prompt, looks_like_sentence(prompt) if is_sentence is None else is_sentence, lower=True)


def conversation_turns(conversation: Conversation) -> list[str]:
    """Texts of a conversation, the photo's tag in front: user, assistant, ..., user.

    Raises ValueError for roles that do not alternate, and for a reserved token in a text of the user.
    """
    alone = isinstance(conversation, str)
    messages: list[Any] = [{"role": "user", "content": conversation}] if alone else list(conversation)
    roles = [message.get("role") for message in messages]
    if roles != ["assistant" if index % 2 else "user" for index in range(len(roles))] or len(roles) % 2 == 0:
        raise ValueError(
            f"the roles are {roles}; expected user, assistant, ..., user (the system sentence is part of the weights)"
        )
    texts = []
    for index, message in enumerate(messages):
        content = message["content"]
        if not isinstance(content, str):  # the library's parts; the photo is in front anyway
            content = "".join(part["text"] for part in content if part["type"] == "text")
        if index == 0:
            content = content.removeprefix(IMAGE_TAG).removeprefix("\n")
        check_prompt(content.replace(SEG, "it") if index % 2 else content)
        texts.append(content)
    return [f"{IMAGE_TAG}\n{texts[0]}", *texts[1:]]


def _groups(counts: Sequence[int], limit: int) -> Iterator[slice]:
    """Slices of neighbouring photos with at most `limit` rows together, but at least one photo with rows."""
    if limit < 1:
        raise ValueError(f"rows_per_forward (--batch_size) is {limit}; it must be at least 1")
    start = rows = 0
    for stop, count in enumerate(counts):
        if rows and rows + count > limit:
            yield slice(start, stop)
            start, rows = stop, 0
        rows += count
    if rows:
        yield slice(start, len(counts))
