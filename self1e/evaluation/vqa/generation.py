"""Replies to questions: batches of one photo's questions, left-padded, greedy, decoded and tiled in workers."""

from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from self1e import distributed
from self1e.data.samples import SampleError
from self1e.evaluation.results import Results, Stopped
from self1e.evaluation.vqa.base import Question
from self1e.model.prompts import END_OF_TURN, IMAGE_TAG


class Replies(Results):
    """The replies to a benchmark on disk; a line holds `index`, the place in the question file, and `answer`."""

    def __init__(self, folder: Path, name: str, questions: Sequence[Question]):
        asked = {index: {"question_id": q.id, "prompt": q.prompt} for index, q in enumerate(questions)}
        super().__init__(folder, name, asked, key="index")

    def records(self, replies: Mapping[int, str]) -> list[dict]:
        """Index -> reply as lines, in the order of the questions."""
        return [{"index": i, **self.asked[i], "answer": reply} for i, reply in sorted(replies.items())]


def make_batches(questions: Sequence[Question], indices: Sequence[int], size: int) -> list[list[int]]:
    """Indices in batches of `size`, questions of one photo next to each other (it is encoded once per batch)."""
    by_image: dict[Any, list[int]] = {}
    for index in indices:
        by_image.setdefault(questions[index].image, []).append(index)
    order = list(chain.from_iterable(by_image.values()))
    return [order[start : start + size] for start in range(0, len(order), size)]


class Prompts(Dataset):
    """Batch number -> left-padded model inputs, or the error of a broken photo, which is to be raised.

    A worker that raised it would bury it in a traceback of its own.
    """

    def __init__(self, questions: Sequence[Question], batches: list[list[int]], processor, max_tiles: int):
        self.questions, self.batches, self.processor = questions, batches, processor
        self.tiling = {"max_tiles": max_tiles, "thumbnail": max_tiles > 1}

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, number: int) -> dict[str, torch.Tensor] | SampleError:
        conversations: dict[Any, list[list[str]]] = {}
        photos = {}
        for question in (self.questions[index] for index in self.batches[number]):
            if question.image not in photos:
                try:
                    photos[question.image] = question.open_image()
                except SampleError as error:
                    return error
            text = question.prompt if IMAGE_TAG in question.prompt else f"{IMAGE_TAG}\n{question.prompt}"
            conversations.setdefault(question.image, []).append([text])
        batch = self.processor(list(photos.values()), list(conversations.values()), padding_side="left", **self.tiling)
        del batch["labels"]
        return dict(batch)


@torch.inference_mode()
def generate_replies(
    model, tokenizer, batch: dict[str, torch.Tensor], max_new_tokens: int, **options: Any
) -> list[str]:
    """Replies to the conversations of a left-padded batch, each as if it were asked alone.

    At least one token, at most `max_new_tokens`, ended by `<|im_end|>`; special tokens dropped, cut at the first
    separator, stripped (InternVL's `chat`). Greedy unless `options` of `generate` say otherwise.
    """
    batch = {name: value.to(model.device) for name, value in batch.items()}
    # Encoded here, since `generate` would repeat the images' tensors for each beam.
    images = model.encode_images(batch.pop("pixel_values"), batch.pop("tile_grids"), for_masks=False)
    ids = model.generate(
        **batch,
        image_features=images,
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
    timeout: float = 0,
    results: Replies | None = None,
    asked_to_stop: Callable[[], bool] | None = None,
    title: str = "",
) -> dict[int, str]:
    """Index -> reply to `questions[index]`, for all `indices`, on every rank; each batch is answered by one of them.

    Args:
        max_tiles: 1 for the one resized image, more for InternVL's dynamic tiling with a thumbnail.
        workers: processes that decode and tile. timeout: seconds that one of them may take for a batch; 0: any time.
        results: where the replies of a batch are written as soon as this rank has them.
        asked_to_stop: called before each batch; where it returns True, this rank leaves, and when the others have
            left or finished, all raise `Stopped`.

    Raises SampleError, on the rank that meets it, for a photo that cannot be decoded.
    """
    batches = make_batches(questions, indices, batch_size)[distributed.rank() :: distributed.world_size()]
    loader = DataLoader(
        Prompts(questions, batches, processor, max_tiles),
        batch_size=None,
        num_workers=min(workers, len(batches)),
        timeout=timeout if workers and batches else 0,
        worker_init_fn=distributed.ignore_signals,
    )
    replies: dict[int, str] = {}
    stopped = False
    with tqdm(total=sum(map(len, batches)), desc=title, unit="question", disable=not distributed.is_main()) as bar:
        for asked, batch in zip(batches, loader):
            stopped = asked_to_stop is not None and asked_to_stop()
            if stopped:
                break
            if isinstance(batch, SampleError):
                raise batch
            new = dict(zip(asked, generate_replies(model, processor.tokenizer, batch, max_new_tokens), strict=True))
            replies |= new
            if results is not None:
                results.append(results.records(new))
            bar.update(len(asked))
    parts = distributed.gather((replies, stopped))
    if any(stopped for _, stopped in parts):
        raise Stopped(title)
    return {index: reply for replies, _ in parts for index, reply in replies.items()}
