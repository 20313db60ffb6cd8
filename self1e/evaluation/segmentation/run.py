"""Evaluate a model on segmentation splits: every sentence once, on any number of processes.

Each photo is encoded once and serves all its sentences, at most `conversations_per_forward` of them in one pass.
Photos are decoded and tiled in DataLoader workers. Results are written as photos finish, and an interrupted
evaluation continues behind the last of them.

Whoever meets an error raises it, with the photo's name where data is at fault, and the launcher ends the others.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from self1e import distributed
from self1e.data.masks import encode_mask
from self1e.data.paths import missing, require_paths
from self1e.data.samples import EvalImage, SampleError
from self1e.data.splits import SplitEntry, file_stem, get_splits, load_split, split_paths
from self1e.data.totals import completeness
from self1e.errors import UserError
from self1e.evaluation.results import Results, Stopped, claim_folder, make_settings
from self1e.evaluation.segmentation.metrics import Unit, count_pixels, iou, score
from self1e.evaluation.segmentation.report import save_figures, save_pictures, summary_table
from self1e.model.config import SWITCHES
from self1e.model.inference import masks_of
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


class Photos(Dataset):
    """Photo number -> (model inputs, masks uint8 (n, H, W)), or the error of a broken photo, which is to be raised.

    A worker that raised it would bury it in a traceback of its own.
    """

    def __init__(self, split: Sequence[EvalImage], processor, **limits: int):
        self.split, self.processor, self.limits = split, processor, limits

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, number: int) -> tuple[dict[str, Any], np.ndarray] | Exception:
        photo = self.split[number]
        conversations = [[prompt, ANSWER] for prompt in photo.prompts]
        try:
            image, masks = photo.load()
            batch = dict(self.processor(images=[image], conversations=[conversations], **self.limits))
        except SampleError as error:
            return error
        except UserError as error:  # a sentence that is longer than --model_max_length
            return SampleError(photo.image_id, str(error))
        del batch["labels"]
        return batch, masks


def unit_texts(photo: EvalImage) -> list[str]:
    """The prompts of a photo as units hold them: without the image."""
    return [prompt.removeprefix(IMAGE_TAG).strip() for prompt in photo.prompts]


def make_units(photo: EvalImage, entry: SplitEntry, masks: np.ndarray, targets: np.ndarray) -> list[Unit]:
    """The units of one photo from predicted masks, bool (n, H, W), and targets, uint8 (n, H, W)."""
    marks: list[dict[str, Any]] = {
        "rela": [{"no_target": mark} for mark in photo.no_target],
        "reasonseg": [{"is_sentence": mark} for mark in photo.is_sentence],
    }.get(entry.protocol, [{}] * len(masks))
    return [
        Unit(id=id, image=photo.image_id, text=text, **count_pixels(mask, target), **own, mask=encode_mask(mask))
        for id, text, mask, target, own in zip(photo.unit_ids, unit_texts(photo), masks, targets, marks, strict=True)
    ]


@torch.no_grad()
def evaluate_units(
    model,
    processor,
    split: Sequence[EvalImage],
    entry: SplitEntry,
    *,
    results: Results | None = None,
    found: Mapping[str, Unit] | None = None,
    workers: int = 4,
    timeout: float = 0,
    conversations_per_forward: int = 16,
    model_max_length: int = 512,
    high_res: bool = False,
    asked_to_stop: Callable[[], bool] | None = None,
    title: str = "",
) -> list[Unit]:
    """The units of a whole split in its order, on every rank. Arguments and errors are those of `evaluate_splits`.

    results: where each rank writes the units of a photo as soon as it has them. found: units by id that are known; a
    photo all of whose units are among them is passed over.
    """
    units, ids = dict(found or {}), [photo.unit_ids for photo in split]
    sentences = {number: len(own) for number, own in enumerate(ids) if not units.keys() >= set(own)}
    rank, world = distributed.rank(), distributed.world_size()
    schedule = make_schedule(sentences, rank, world, conversations_per_forward)
    max_tiles = HIGH_RES_TILES if high_res else 1
    loader = DataLoader(
        Photos(split, processor, max_tiles=max_tiles, max_length=model_max_length),
        sampler=[visit.photo for visit in schedule],
        batch_size=None,
        num_workers=min(workers, len(schedule)),
        timeout=timeout if workers and schedule else 0,
        generator=torch.Generator(),  # or the loader would draw from the global one, and training after it change
        worker_init_fn=distributed.ignore_signals,
    )
    I, U = (sum(getattr(unit, name) for unit in units.values()) for name in ("I", "U"))
    done = (len(ids) - len(sentences)) // world
    bar = tqdm(schedule, total=done + len(schedule), initial=done, desc=title, unit="photo", disable=rank > 0)
    stopped = False
    for visit, item in zip(bar, loader):
        stopped = asked_to_stop is not None and asked_to_stop()
        if stopped:
            break
        if isinstance(item, Exception):
            raise item
        batch, targets = item[0], np.asarray(item[1])
        passes = {"conversations_per_forward": conversations_per_forward, "forwards": visit.forwards}
        predicted = masks_of(model, batch, [targets.shape[1:]], **passes)
        masks = torch.stack([one.foreground[-1] for one in predicted])  # the answer's [SEG] is the last
        if visit.counts:
            new = make_units(split[visit.photo], entry, masks.cpu().numpy(), targets)
            units |= {unit.id: unit for unit in new}
            if results is not None:
                results.append(unit.record() for unit in new)
            I, U = I + sum(unit.I for unit in new), U + sum(unit.U for unit in new)
            bar.set_postfix(cIoU=f"{iou(I, U):.3f}", refresh=False)
    bar.close()
    parts = distributed.gather((units, stopped))
    if any(stopped for _, stopped in parts):
        raise Stopped(title)
    together = {id: unit for units, _ in parts for id, unit in units.items()}
    return [together[id] for own in ids for id in own]


def evaluate_splits(
    model,
    processor,
    splits: Iterable[str],
    *,
    dataset_dir: str | Path,
    output_dir: str | Path,
    allow_outside: bool = False,
    workers: int = 4,
    timeout: float = 0,
    conversations_per_forward: int = 16,
    model_max_length: int = 512,
    high_res: bool = False,
    visualize: bool = False,
    show: Callable[[str, Sequence[EvalImage], list[Unit]], None] | None = None,
    skip_missing: bool = False,
    weights: Mapping[str, str | None] | None = None,
    overwrite: bool = False,
    asked_to_stop: Callable[[], bool] | None = None,
    print_table: bool = True,
) -> dict[str, dict]:
    """Score `model` on `splits` and write the files that `segmentation.report` describes.

    Args:
        model: `Self1EForSegmentation` on its device; put into evaluation mode, and back afterwards.
        splits: names of `SPLITS`, or with one of `PREFIXES`.
        dataset_dir: root of the segmentation data. output_dir: made when absent; rank 0 writes.
        allow_outside: photos may lie outside the folders of their split (see `data.paths.inside`).
        workers: decoding processes per rank. timeout: seconds that one of them may take for a photo; 0: any time.
        conversations_per_forward: sentences of a photo in one pass.
        model_max_length: the most tokens of a conversation. high_res: up to 4 tiles per photo.
        visualize: pictures of the worst sentences in `<output_dir>/<split>/`, and an overview.
        show: takes each finished split on rank 0: its name, photos and units.
        skip_missing: leave out splits whose data is absent, with a message, instead of raising.
        weights: `model.weights.weights_identity` of the model. With it, what `output_dir` holds of the same settings
            is continued. None: nothing is known of the weights, and everything is evaluated anew.
        overwrite: evaluate anew what `output_dir` holds of `splits`, and delete what it holds of other settings.
        asked_to_stop: called on every rank before each of its photos; where it returns True, that rank leaves, and
            when the others have left or finished the split, all raise `Stopped`. ZeRO-3 takes no such request,
            because a rank cannot run without the others.
        print_table: print what `summary.md` holds at the end.

    Returns split -> figures (`metrics.score`), the same on every rank.

    Raises UserError (unknown split, absent data, no data at all, results of other settings in `output_dir`), and
    SampleError for a broken photo or a sentence that is too long. What was written before an error is kept.
    """
    entries, output_dir = get_splits(splits), Path(output_dir)
    absent = {name for name, _ in missing(split_paths(entries, dataset_dir))}
    if absent and not skip_missing:
        require_paths(missing(split_paths(entries, dataset_dir)))
    if len(absent) == len(entries):
        raise UserError(f"nothing was evaluated: none of the splits has its data in {dataset_dir} (--dataset_dir)")
    if absent:
        skipped = ", ".join(name for name in entries if name in absent)
        distributed.say(f"skipped, because their data is not in {dataset_dir}: {skipped}")
    available = {
        name: load_split(name, dataset_dir, allow_outside=allow_outside) for name in entries if name not in absent
    }
    fresh = overwrite or weights is None
    settings = make_settings(weights, **model_settings(model), high_res=high_res)
    distributed.on_main(partial(claim_folder, output_dir, settings, overwrite=fresh))
    was_training, figures = model.training, {}
    model.eval()
    for name, split in available.items():
        asked = {
            id: {"image": photo.image_id, "text": text}
            for photo in split
            for id, text in zip(photo.unit_ids, unit_texts(photo))
        }
        results = Results(output_dir, file_stem(name), asked)
        records = distributed.on_main(partial(results.open, overwrite=fresh))
        units = evaluate_units(
            model, processor, split, entries[name], results=results, workers=workers, timeout=timeout, title=name,
            found={id: Unit.read(record) for id, record in records.items()}, high_res=high_res,
            conversations_per_forward=conversations_per_forward, model_max_length=model_max_length,
            asked_to_stop=asked_to_stop,
        )  # fmt: skip
        note = {"note": split.note} if split.note else {}
        figures[name] = {"split": name, "data": completeness(name, split), **note, **score(units)}
        if distributed.is_main():
            results.finish(unit.record() for unit in units)
            save_figures(output_dir, figures[name])
            if visualize:
                save_pictures(output_dir / file_stem(name), split, units)
            if show is not None:
                show(name, split, units)
    model.train(was_training)
    if print_table:
        distributed.say(f"{summary_table(figures)}\nthe figures are in {output_dir / 'summary.md'}")
    return figures


def model_settings(model) -> dict:
    """The settings of a loaded model that decide its masks, for `settings.json`."""
    config = model.config
    switches = [name for name in SWITCHES if not name.startswith("auxiliary_")]
    return {
        "precision": str(model.dtype).removeprefix("torch."),
        "attn_implementation": config._attn_implementation,
        **{name: getattr(config, name) for name in switches},
    }
