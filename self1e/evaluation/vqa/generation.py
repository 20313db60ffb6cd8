"""Replies to questions: batches of one photo's questions, left-padded, greedy, decoded and tiled in workers."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from self1e import distributed
from self1e.evaluation.loop import prepared, progress
from self1e.evaluation.results import Results
from self1e.evaluation.vqa.base import Question
from self1e.model.prompts import END_OF_TURN, IMAGE_TAG


def replies_of(folder: Path, name: str, questions: Sequence[Question]) -> Results:
    """The replies to a benchmark on disk; a line holds `index`, the place in the question file, and `answer`."""
    asked = {index: {"question_id": q.id, "prompt": q.prompt} for index, q in enumerate(questions)}
    return Results(folder, name, asked, key="index")


def make_batches(questions: Sequence[Question], indices: Sequence[int], size: int) -> list[list[int]]:
    """Indices in batches of `size`, questions of one photo next to each other (it is encoded once per batch)."""
    first = {questions[index].image: index for index in reversed(indices)}
    order = sorted(indices, key=lambda index: first[questions[index].image])
    return [order[start : start + size] for start in range(0, len(order), size)]


def prepare_batch(
    questions: Sequence[Question], processor, max_tiles: int, indices: Sequence[int]
) -> dict[str, torch.Tensor]:
    """Left-padded model inputs of some questions. Raises UserError for a photo that cannot be decoded."""
    conversations: dict[Any, list[list[str]]] = {}
    photos = {}
    for question in (questions[index] for index in indices):
        if question.image not in photos:
            photos[question.image] = question.open_image()
        text = question.prompt if IMAGE_TAG in question.prompt else f"{IMAGE_TAG}\n{question.prompt}"
        conversations.setdefault(question.image, []).append([text])
    options = {"padding_side": "left", "max_tiles": max_tiles, "thumbnail": max_tiles > 1}
    batch = dict(processor(list(photos.values()), list(conversations.values()), **options))
    del batch["labels"]
    return batch


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
    results: Results,
    *,
    max_new_tokens: int,
    batch_size: int = 8,
    max_tiles: int = 1,
    title: str = "",
    **workers: Any,
) -> list[str]:
    """The replies to all questions, on every rank; those that `results`, of `replies_of`, holds are not asked again.

    max_tiles: 1 for the one resized image, more for InternVL's dynamic tiling. workers: of `prepared`.
    """
    unanswered = [index for index in range(len(questions)) if index not in results.found]
    batches = make_batches(questions, unanswered, batch_size)[distributed.rank() :: distributed.world_size()]
    prepare = partial(prepare_batch, questions, processor, max_tiles)
    with progress(sum(map(len, batches)), desc=title, unit="question") as bar:
        for indices, batch in prepared(batches, prepare, **workers):
            replies = generate_replies(model, processor.tokenizer, batch, max_new_tokens)
            results.append({index: {"answer": reply} for index, reply in zip(indices, replies, strict=True)})
            bar.update(len(indices))
    return [record["answer"] for record in results.finish()]
