"""Every prompt to every picture: the loop behind `self1e segment` and `self1e chat`, and one picture's turn of it."""

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image
from tqdm import tqdm

from self1e import Self1EForSegmentation, Self1EProcessor
from self1e.apps.results import Results, picture_names
from self1e.data.samples import SampleError, load_image
from self1e.flags import counted
from self1e.model.inference import Reply


def ask(
    model: Self1EForSegmentation,
    processor: Self1EProcessor,
    images: list[Image.Image],
    prompts: list[str],
    *,
    mode: str,
    threshold: float,
    max_tiles: int,
    batch_size: int,
    max_new_tokens: int,
    is_sentence: bool | None = None,
) -> list[list[Reply]]:
    """Every prompt to every picture, per picture one reply per prompt.

    mode: `segment` or `chat`. The other options are those of `model.segment` and `model.chat`.
    """
    if mode == "segment":
        found: Any = model.segment(
            processor, images, prompts, is_sentence=is_sentence, threshold=threshold, max_tiles=max_tiles,
            conversations_per_forward=batch_size,
        )  # fmt: skip
        return [[Reply(x.text, x.mask[None], x.logits[None], [x.score]) for x in row] for row in found]
    photos = [image for image in images for _ in prompts]
    replies: Any = model.chat(
        processor, photos, prompts * len(images), max_new_tokens=max_new_tokens, threshold=threshold,
        max_tiles=max_tiles, conversations_per_forward=batch_size,
    )  # fmt: skip
    return [replies[start : start + len(prompts)] for start in range(0, len(replies), len(prompts))]


def predict(
    model: Self1EForSegmentation,
    processor: Self1EProcessor,
    paths: Sequence[Path],
    prompts: Sequence[str],
    results: Results,
    **options,
) -> list[str]:
    """Ask every prompt of every picture and write what comes. options: of `ask`.

    Returns messages about the pictures that could not be read. What was finished before any error is written; Ctrl-C
    is raised on with a sentence that says how much that is.
    """
    names, unreadable, done = picture_names(paths), [], 0
    together = max(1, options["batch_size"] // len(prompts))
    bar = tqdm(total=len(paths), unit="picture", disable=len(paths) == 1)
    try:
        for start in range(0, len(paths), together):
            loaded = []
            for number in range(start, min(start + together, len(paths))):
                try:
                    loaded.append((number, load_image(paths[number])))
                except SampleError as error:
                    unreadable.append(error.cause)
                    tqdm.write(f"skipped: {error.cause}", file=sys.stderr)
            if loaded:
                begin = time.perf_counter()
                found = ask(model, processor, [image for _, image in loaded], list(prompts), **options)
                seconds = (time.perf_counter() - begin) / (len(loaded) * len(prompts))
                for (number, image), replies in zip(loaded, found):
                    for turn, (prompt, reply) in enumerate(zip(prompts, replies)):
                        results.add(
                            paths[number], names[number], image, place=(number, turn), prompt=prompt, reply=reply,
                            seconds=seconds,
                        )  # fmt: skip
                results.write()
            done = min(start + together, len(paths))
            bar.update(done - start)
    except KeyboardInterrupt:
        message = f"stopped after {done} of {counted(len(paths), 'picture')}; their results are in {results.folder}"
        raise KeyboardInterrupt(message) from None
    finally:
        bar.close()
        results.write(now=True)
    return unreadable
