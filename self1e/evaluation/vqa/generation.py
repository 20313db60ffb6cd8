"""Replies to questions: batches of one photo's questions, left-padded, greedy, decoded and tiled in workers."""

from collections.abc import Iterator, Sequence
from contextlib import closing
from itertools import chain
from typing import Any

import torch
from torch.utils.data import Dataset
from tqdm import tqdm

from self1e.data.samples import SampleError
from self1e.errors import UserError
from self1e.evaluation.loading import read_ahead
from self1e.evaluation.vqa.base import Question
from self1e.evaluation.watchdog import Watchdog
from self1e.model.prompts import END_OF_TURN, IMAGE_TAG


def make_batches(questions: Sequence[Question], indices: Sequence[int], size: int) -> list[list[int]]:
    """Indices in batches of `size`, questions of one photo next to each other (it is encoded once per batch)."""
    by_image: dict[Any, list[int]] = {}
    for index in indices:
        by_image.setdefault(questions[index].image, []).append(index)
    order = list(chain.from_iterable(by_image.values()))
    return [order[start : start + size] for start in range(0, len(order), size)]


class _Prompts(Dataset):
    """Batch number -> (question indices, left-padded model inputs).

    A broken photo or text comes back as its error for the main process to raise: a worker would bury it.
    """

    def __init__(self, questions: Sequence[Question], batches: list[list[int]], processor, tiling: dict):
        self.questions, self.batches, self.processor, self.tiling = questions, batches, processor, tiling

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, number: int) -> tuple[list[int], dict] | Exception:
        rows: dict[Any, list[list[str]]] = {}
        photos = {}
        for index in self.batches[number]:
            question = self.questions[index]
            if question.image not in photos:
                try:
                    photos[question.image] = question.open_image()
                except SampleError as error:
                    return ValueError(str(error))
            text = question.prompt if IMAGE_TAG in question.prompt else f"{IMAGE_TAG}\n{question.prompt}"
            rows.setdefault(question.image, []).append([text])
        try:
            batch = self.processor(list(photos.values()), list(rows.values()), padding_side="left", **self.tiling)
        except UserError as error:  # a control token in the text
            return UserError(
                f"question {' or '.join(str(self.questions[i].id) for i in self.batches[number])}: {error}"
            )
        del batch["labels"]
        return self.batches[number], dict(batch)


@torch.inference_mode()
def generate_replies(
    model, tokenizer, batch: dict[str, torch.Tensor], max_new_tokens: int, **options: Any
) -> list[str]:
    """Replies to the rows of a left-padded batch, each as if it were asked alone; greedy unless `options` of
    `generate` say otherwise.

    At least one token, at most `max_new_tokens`, ended by `<|im_end|>`; special tokens dropped, cut at the first
    separator, stripped (InternVL's `chat`).
    """
    batch = {name: value.to(model.device) for name, value in batch.items()}
    ids = model.generate(
        **batch,
        **{"do_sample": False, "num_beams": 1, **options},
        min_new_tokens=1,
        max_new_tokens=max_new_tokens,
        eos_token_id=tokenizer.convert_tokens_to_ids(END_OF_TURN),
        pad_token_id=tokenizer.pad_token_id,
    )
    texts = tokenizer.batch_decode(ids[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    return [text.split(END_OF_TURN)[0].strip() for text in texts]


def answer_questions(
    model,
    processor,
    questions: Sequence[Question],
    indices: Sequence[int],
    *,
    max_new_tokens: int,
    batch_size: int = 8,
    max_tiles: int = 1,
    workers: int = 0,
    progress: str | None = None,
    watchdog: Watchdog | None = None,
) -> Iterator[tuple[list[int], list[str]]]:
    """Replies to `questions[i]`, i in `indices`, batch by batch: (their indices, replies).

    Args:
        max_tiles: 1 for the one resized image, more for InternVL's dynamic tiling with a thumbnail.
        workers: processes that decode and tile.
        progress: title of a bar; None for none.
        watchdog: hears which questions this rank is at.

    Raises:
        ValueError: a photo cannot be decoded. UserError: a text holds a reserved token; the message names it.
        SampleError: a process that decodes died.
    """
    batches = make_batches(questions, indices, batch_size)
    tiling = {"max_tiles": max_tiles, "thumbnail": max_tiles > 1}
    dataset = _Prompts(questions, batches, processor, tiling)

    def name(number: int) -> str:
        return " or ".join(questions[index].name for index in batches[number])

    reading = read_ahead(dataset, range(len(batches)), workers=workers, name=name, watchdog=watchdog)
    bar = tqdm(total=len(indices), desc=progress, unit="question", disable=progress is None)
    with closing(reading) as items, bar:
        for item in items:
            if isinstance(item, Exception):
                raise item
            asked, batch = item
            yield asked, generate_replies(model, processor.tokenizer, batch, max_new_tokens)
            bar.update(len(asked))
