"""Evaluate a model on segmentation splits: every sentence once, on any number of processes.

Each photo is encoded once and serves all its sentences. Results are written as photos finish, and an interrupted
evaluation continues behind the last of them. Whoever meets an error raises it, and the launcher ends the others.
"""

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from self1e import distributed
from self1e.data.masks import encode_mask
from self1e.data.samples import missing, naming, require_paths
from self1e.data.sets.expressions import EvalImage
from self1e.data.splits import get_splits, split_readers
from self1e.errors import UserError
from self1e.evaluation.loop import prepared, progress
from self1e.evaluation.results import Results, claim_folder, completeness, file_stem, make_settings
from self1e.evaluation.segmentation.metrics import MARKS, Unit, count_pixels, score
from self1e.evaluation.segmentation.report import save_figures, save_pictures, summary_table
from self1e.model.config import SWITCHES
from self1e.model.inference import evaluating, masks_of
from self1e.model.processor import HIGH_RES_TILES
from self1e.model.prompts import ANSWER, IMAGE_TAG


class Visit(NamedTuple):
    """One photo of a rank's schedule: `forwards` passes over its sentences; `counts` is False for a repeated one."""

    photo: int
    forwards: int
    counts: bool


def make_schedule(sentences: Mapping[int, int], rank: int, world: int, per_forward: int) -> list[Visit]:
    """The photos of one rank, photo -> number of sentences being dealt in rounds, those with most sentences first.

    All ranks run as many forwards, because ZeRO-3 gathers weights layer by layer: in a round as many as its first
    photo needs, and who has no photo in the last round repeats the last one.
    """
    order = sorted(sentences, key=lambda photo: (-sentences[photo], photo))
    rounds = [order[start : start + world] for start in range(0, len(order), world)]
    return [
        Visit(photos[min(rank, len(photos) - 1)], -(-sentences[photos[0]] // per_forward), rank < len(photos))
        for photos in rounds
    ]


def units_of(folder: Path, name: str, split: Sequence[EvalImage]) -> Results:
    """The units of a split on disk, whose texts are the prompts without the image."""
    asked = {
        id: {"image": photo.image_id, "text": prompt.removeprefix(IMAGE_TAG).strip()}
        for photo in split
        for id, prompt in zip(photo.unit_ids, photo.prompts)
    }
    return Results(folder, file_stem(name), asked)


def prepare_photo(
    split: Sequence[EvalImage], processor, limits: Mapping[str, int], visit: Visit
) -> tuple[dict[str, Any], np.ndarray]:
    """Model inputs and masks uint8 (n, H, W). Raises UserError, also for a sentence that is too long."""
    photo = split[visit.photo]
    with naming(photo.image_id):
        image, masks = photo.load()
        conversations = [[prompt, ANSWER] for prompt in photo.prompts]
        batch = dict(processor(images=[image], conversations=[conversations], **limits))
    del batch["labels"]
    return batch, masks


def measure(photo: EvalImage, protocol: str, masks: np.ndarray, targets: np.ndarray) -> dict[str, dict]:
    """Unit id -> what `Unit` holds of it, from predicted masks, bool (n, H, W), and targets, uint8 (n, H, W)."""
    marks = [MARKS[protocol]] if protocol in MARKS else []
    return {
        id: {**count_pixels(mask, target), **{mark: getattr(asked, mark) for mark in marks}, "mask": encode_mask(mask)}
        for id, asked, mask, target in zip(photo.unit_ids, photo.expressions, masks, targets, strict=True)
    }


@torch.no_grad()
def evaluate_units(
    model,
    processor,
    split: Sequence[EvalImage],
    protocol: str,
    results: Results,
    *,
    conversations_per_forward: int = 16,
    model_max_length: int = 512,
    high_res: bool = False,
    title: str = "",
    **workers: Any,
) -> list[Unit]:
    """The units of a whole split in its order, on every rank; those that `results`, of `units_of`, holds are known.

    conversations_per_forward: sentences of a photo in one pass. model_max_length: the most tokens of each.
    workers: of `prepared`. ZeRO-3 takes no `asked_to_stop`, because a rank cannot run without the others.
    """
    ids = [photo.unit_ids for photo in split]
    sentences = {number: len(own) for number, own in enumerate(ids) if not results.found.keys() >= set(own)}
    schedule = make_schedule(sentences, distributed.rank(), distributed.world_size(), conversations_per_forward)
    limits = {"max_tiles": HIGH_RES_TILES if high_res else 1, "max_length": model_max_length}
    with progress(len(schedule), desc=title, unit="photo") as bar:
        for visit, (batch, targets) in prepared(schedule, partial(prepare_photo, split, processor, limits), **workers):
            passes = {"conversations_per_forward": conversations_per_forward, "forwards": visit.forwards}
            predicted = masks_of(model, batch, [targets.shape[1:]], **passes)
            masks = torch.stack([foreground[-1] for foreground, _ in predicted])  # the answer's [SEG] is the last
            if visit.counts:
                results.append(measure(split[visit.photo], protocol, masks.cpu().numpy(), np.asarray(targets)))
            bar.update()
    return [Unit(**record) for record in results.finish()]


def evaluate_splits(
    model,
    processor,
    splits: Iterable[str],
    *,
    dataset_dir: str | Path,
    output_dir: str | Path,
    allow_outside: bool = False,
    visualize: bool = False,
    skip_missing: bool = False,
    weights: Mapping[str, str | None] | None = None,
    overwrite: bool = False,
    print_table: bool = True,
    **options: Any,
) -> dict[str, dict]:
    """Score `model` on `splits` and write the files that `segmentation.report` describes.

    Args:
        splits: names of `SPLITS`, or with one of `PREFIXES`.
        allow_outside: photos may lie outside the folders of their split (see `data.samples.inside`).
        visualize: draw the worst sentences, see `save_pictures`.
        skip_missing: leave out splits whose data is absent, with a message, instead of raising.
        weights: `weights_identity` of the model, by which what `output_dir` holds of the same settings is continued.
        overwrite: evaluate `splits` anew, and delete results of other settings; so does `weights=None`.
        options: of `evaluate_units` and of `prepared`.

    Returns split -> figures (`metrics.score`), the same on every rank. Raises `Stopped`, and UserError
    also for a photo that is broken or a sentence that is too long; what was written before is kept.
    """
    entries, output_dir = get_splits(splits), Path(output_dir)
    readers = split_readers(entries, dataset_dir, allow_outside=allow_outside)
    if not skip_missing:
        require_paths(readers.values())
    absent = [name for name, reader in readers.items() if missing(reader)]
    available = {name: reader.opened() for name, reader in readers.items() if name not in absent}
    if not available:
        raise UserError(f"nothing was evaluated: none of the splits has its data in {dataset_dir} (--dataset_dir)")
    if absent:
        distributed.say(f"skipped, because their data is not in {dataset_dir}: {', '.join(absent)}")
    fresh = overwrite or weights is None
    deciding = {name: getattr(model.config, name) for name in SWITCHES if not name.startswith("auxiliary_")}
    settings = make_settings(
        weights, precision=str(model.dtype).removeprefix("torch."), **deciding,
        attn_implementation=model.config._attn_implementation, high_res=options.get("high_res", False),
    )  # fmt: skip
    distributed.on_main(partial(claim_folder, output_dir, settings, overwrite=fresh))
    figures = {}
    with evaluating(model):
        for name, split in available.items():
            results = units_of(output_dir, name, split)
            results.open(overwrite=fresh)
            units = evaluate_units(model, processor, split, entries[name].protocol, results, title=name, **options)
            figures[name] = {"split": name, "data": completeness(name, split), **score(units)}
            if distributed.is_main():
                save_figures(output_dir, figures[name])
                if visualize:
                    save_pictures(output_dir / file_stem(name), split, units)
    if print_table:
        distributed.say(f"{summary_table(figures)}\nthe figures are in {output_dir / 'summary.md'}")
    return figures
