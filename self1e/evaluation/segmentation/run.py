"""Evaluate a model on segmentation splits: every sentence once, on any number of processes.

Each photo is encoded once and serves all its sentences, at most `rows_per_forward` of them in a forward pass. Photos
are decoded and tiled in DataLoader workers. All ranks run the same sequence of forwards (ZeRO-3 gathers weights
layer by layer, so they must stay in step); surplus ones repeat a photo and their result is dropped.

Units are written as photos finish, and an interrupted evaluation continues behind the last one.
"""

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm

from self1e import distributed
from self1e.data.masks import encode_mask
from self1e.data.paths import missing, require_paths
from self1e.data.samples import EvalImage, SampleError
from self1e.data.splits import SplitEntry, get_splits, load_split, split_paths
from self1e.data.totals import compare
from self1e.evaluation.journal import Journal
from self1e.evaluation.loading import read_ahead
from self1e.evaluation.provenance import describe
from self1e.evaluation.segmentation.metrics import Unit, count_pixels, iou, score
from self1e.evaluation.segmentation.report import SplitResults, summary_table, unit_text
from self1e.evaluation.watchdog import Watchdog
from self1e.model.inference import predict_photo
from self1e.model.processing import HIGH_RES_TILES
from self1e.model.prompts import ANSWER
from self1e.model.switches import SWITCHES

READING = (ValueError, OSError, SampleError)  # what data and results on disk may cause


class Left(Exception):
    """An evaluation was left before its end because `asked_to_stop` said so."""


@dataclass(frozen=True)
class Turn:
    """One photo of a rank's schedule: `forwards` passes over its rows; `counts` is False for a filler."""

    photo: int
    forwards: int
    counts: bool


def make_schedule(rows: Mapping[int, int], rank: int, world: int, rows_per_forward: int) -> list[Turn]:
    """Deal photos to ranks, those with most rows first; every rank gets as many turns of as many forwards.

    rows: photo -> number of its sentences. Neighbours in the deal differ little in rows, so few forwards are surplus.
    """
    order = sorted(rows, key=lambda photo: (-rows[photo], photo))
    turns = []
    for start in range(0, len(order), world):
        forwards = -(-rows[order[start]] // rows_per_forward)  # the first of a round has most rows
        place = start + rank
        turns.append(Turn(order[min(place, len(order) - 1)], forwards, counts=place < len(order)))
    return turns


class _Photos(Dataset):
    """Photo number -> (model inputs, masks), or the error that a broken photo or sentence causes."""

    def __init__(self, split: Sequence[EvalImage], processor, model_max_length: int, max_tiles: int):
        self.split, self.processor = split, processor
        self.model_max_length, self.max_tiles = model_max_length, max_tiles

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, number: int) -> tuple[dict[str, Tensor], np.ndarray] | Exception:
        photo = self.split[number]
        rows = [[prompt, ANSWER] for prompt in photo.prompts]
        limits = {"max_tiles": self.max_tiles, "max_length": self.model_max_length}
        try:
            image, masks = photo.load()
        except SampleError as error:
            return error
        try:
            batch = dict(self.processor(images=[image], conversations=[rows], **limits))
        except ValueError as error:  # a sentence that does not fit, or holds a reserved token
            return ValueError(f"{photo.image_id}: {error}")
        del batch["labels"]
        return batch, masks


def make_units(photo: EvalImage, entry: SplitEntry, masks: np.ndarray, targets: np.ndarray) -> list[Unit]:
    """Count one photo: its units from predicted masks, bool (n, H, W), and targets, uint8 (n, H, W)."""
    counts = count_pixels(masks, targets)
    units = []
    for row, unit_id in enumerate(photo.unit_ids):
        marks: dict[str, bool] = {}
        if entry.protocol == "rela":
            marks["no_target"] = photo.no_target[row]
        if entry.protocol == "reasonseg":
            marks["is_sentence"] = photo.is_sentence[row]
        text, mask = unit_text(photo.prompts[row]), encode_mask(masks[row])
        numbers: dict[str, Any] = {name: values[row] for name, values in counts.items()}
        units.append(Unit(id=unit_id, image=photo.image_id, text=text, **numbers, **marks, mask=mask))
    return units


@torch.no_grad()
def evaluate_units(
    model,
    processor,
    split: Sequence[EvalImage],
    entry: SplitEntry,
    *,
    kept: Iterable[Unit] = (),
    journal: Journal | None = None,
    workers: int = 4,
    rows_per_forward: int = 16,
    model_max_length: int = 512,
    high_res: bool = False,
    watchdog: Watchdog | None = None,
    asked_to_stop: Callable[[], bool] | None = None,
    title: str = "",
) -> list[Unit]:
    """The units of a whole split in its order, on every rank.

    kept: units that are known already; photos all of whose units are among them are passed over. journal: where each
    rank writes the units of a photo as soon as it has them. watchdog, asked_to_stop: see `evaluate_splits`.

    Raises SampleError for a broken photo or annotation or a dead worker process, ValueError for a sentence that does
    not fit `model_max_length`, OSError for a full disk, each on all ranks; RuntimeError for whatever else one rank
    meets. All but the full disk name the photo.
    """
    ids = [photo.unit_ids for photo in split]
    known = {unit.id: unit for unit in kept}
    found = {photo: [known[id] for id in own] for photo, own in enumerate(ids) if known.keys() >= set(own)}
    rows = {photo: len(own) for photo, own in enumerate(ids) if photo not in found}
    rank, world = distributed.rank(), distributed.world_size()
    schedules = [make_schedule(rows, other, world, rows_per_forward) for other in range(world)]
    turns = schedules[rank]

    def name(photo: int) -> str:
        return f"{title} {split[photo].image_id}".strip()

    def agree(error: Exception | None, step: int) -> None:
        try:
            distributed.raise_together(error)
        except RuntimeError:  # the exchange itself failed
            _name_the_lost(schedules, step, name)
            raise

    reading = read_ahead(
        _Photos(split, processor, model_max_length, HIGH_RES_TILES if high_res else 1),
        [turn.photo for turn in turns],
        workers=workers,
        name=name,
        watchdog=watchdog,
    )
    I, U = (sum(getattr(unit, key) for units in found.values() for unit in units) for key in ("I", "U"))
    bar = tqdm(turns, total=len(ids) // world, initial=len(found) // world, desc=title, unit="photo", disable=rank > 0)
    failure: Exception | None = None
    with closing(reading) as items:  # so that no worker outlives an error
        for step, turn in enumerate(bar):
            if asked_to_stop is not None and asked_to_stop():
                failure = failure or Left(f"left before {name(turn.photo)}")
            with _naming(name(turn.photo)):
                item = next(items)
            agree(item if isinstance(item, Exception) else failure, step)
            batch, targets = item
            with _naming(name(turn.photo)):
                size = tuple(targets.shape[1:])
                masks = predict_photo(model, batch, size, rows_per_forward=rows_per_forward, forwards=turn.forwards)
                if turn.counts:
                    arrays = masks.cpu().numpy()  # the only copy from the device
                    found[turn.photo] = units = make_units(split[turn.photo], entry, arrays, targets)
                    failure = _write(journal, units)  # the others learn of it at the next photo
                    I, U = I + sum(unit.I for unit in units), U + sum(unit.U for unit in units)
                    bar.set_postfix(cIoU=f"{iou(I, U):.3f}", refresh=False)
    agree(failure, len(turns))
    together = {photo: units for part in distributed.gather(found) for photo, units in part.items()}
    if watchdog is not None:
        watchdog.pause()
    assert len(together) == len(split), "a photo is lost"
    return [unit for photo in range(len(split)) for unit in together[photo]]


@contextmanager
def _naming(photo: str) -> Iterator[None]:
    """Name the photo in an error that one rank meets alone; torch raises that of a dead worker at any moment."""
    try:
        yield
    except Exception as error:
        raise RuntimeError(f"{photo}: {error}") from error


def _write(journal: Journal | None, units: Sequence[Unit]) -> OSError | None:
    """Append units to the journal; a full disk is returned and not raised."""
    try:
        if journal is not None:
            journal.append(unit.record() for unit in units)
    except OSError as error:
        return error
    return None


def _name_the_lost(schedules: list[list[Turn]], step: int, name: Callable[[int], str]) -> None:
    """Say where the others were when an exchange with them failed, because one that was killed cannot say it."""
    if distributed.rank() > 1:  # one of the first two is alive, and two messages are enough
        return
    for other, turns in enumerate(schedules):
        if other != distributed.rank():
            photos = dict.fromkeys(name(turn.photo) for turn in turns[max(0, step - 1) : step + 1])
            where = " or ".join(photos)
            print(f"\nrank {distributed.rank()} lost another process; rank {other} was at {where}", file=sys.stderr)
    sys.stderr.flush()


def evaluate_splits(
    model,
    processor,
    splits: Iterable[str],
    *,
    dataset_dir: str | Path,
    allow_outside: bool = False,
    output_dir: str | Path,
    workers: int = 4,
    rows_per_forward: int = 16,
    model_max_length: int = 512,
    high_res: bool = False,
    visualize: bool = False,
    show: Callable[[str, Sequence[EvalImage], list[Unit]], None] | None = None,
    skip_missing: bool = False,
    checkpoint: Mapping[str, str | None] | None = None,
    overwrite: bool = False,
    watchdog: Watchdog | None = None,
    asked_to_stop: Callable[[], bool] | None = None,
    print_table: bool = True,
) -> dict[str, dict]:
    """Score `model` on `splits` and write the files that `segmentation.report` describes.

    Args:
        model: `Self1EForSegmentation` on its device; put into evaluation mode, and back afterwards.
        splits: names of `SPLITS`, or with one of `PREFIXES`.
        dataset_dir: root of the segmentation data. output_dir: made when absent; rank 0 writes.
        allow_outside: photos may lie outside the folders of their split (see `data.paths.inside`).
        workers: decoding processes per rank. rows_per_forward: sentences of a photo in one pass.
        model_max_length: the most tokens of a row. high_res: up to 4 tiles per photo.
        visualize: pictures of the worst sentences in `<output_dir>/<split>/`, and an overview.
        show: takes each finished split on rank 0: its name, photos and units.
        skip_missing: leave out splits whose data is absent, with a message, instead of raising.
        checkpoint: what tells the model's weights from others (`provenance.checkpoint_settings`). With it, what
            `output_dir` holds of the same settings is kept and continued. None: nothing can be kept.
        overwrite: evaluate anew whatever `output_dir` holds.
        watchdog: hears which photo this rank is at.
        asked_to_stop: called on every rank before each photo; where it returns True on one of them, all raise `Left`.
        print_table: print what `summary.md` holds at the end.

    Returns split -> figures (`metrics.score`), the same on every rank.

    Raises ValueError (unknown split, sentence too long, results of other settings in `output_dir`), FileNotFoundError
    (all absent data in one message), SampleError (a broken photo), and KeyboardInterrupt with a message that says what
    is done. Splits finished before an error keep their files.
    """
    entries, output_dir = get_splits(splits), Path(output_dir)
    say = tqdm.write if distributed.is_main() else lambda text: None
    absent = dict(reversed(missing(split_paths(entries, dataset_dir))))  # the first missing path of each split
    if not skip_missing:
        require_paths(missing(split_paths(entries, dataset_dir)))
    elif absent:
        names, path = ", ".join(name for name in entries if name in absent), next(reversed(absent.values()))
        say(f"skipped for want of their data ({path} is missing, for one): {names}")
    available = {
        name: load_split(name, dataset_dir, allow_outside=allow_outside) for name in entries if name not in absent
    }
    distributed.on_main(partial(output_dir.mkdir, parents=True, exist_ok=True))
    options: dict[str, Any] = {"high_res": high_res, "rows_per_forward": rows_per_forward}
    settings = describe({**(checkpoint or {}), **model_settings(model), **options}, model.device)
    fresh = overwrite or checkpoint is None
    for name, split in available.items() if not fresh else ():  # a refusal comes before the long work
        distributed.on_main(partial(SplitResults(output_dir, name).kept, split, settings), catch=READING)
    was_training, results = model.training, {}
    model.eval()
    name = ""
    try:
        for name, split in available.items():
            files = SplitResults(output_dir, name)
            kept = distributed.on_main(partial(files.open, split, settings, overwrite=fresh), catch=READING)
            units = evaluate_units(
                model, processor, split, entries[name], kept=kept, journal=files.journal, workers=workers, title=name,
                model_max_length=model_max_length, watchdog=watchdog, asked_to_stop=asked_to_stop, **options,
            )  # fmt: skip
            notes = {"note": split.note} if split.note else {}
            results[name] = {"split": name, "data": compare(name, split.counts()), **notes, **score(units)}
            distributed.on_main(partial(files.save, units, results))
            if visualize:
                distributed.on_main(partial(files.save_pictures, split, units), catch=READING)
            if show is not None:
                distributed.on_main(partial(show, name, split, units), catch=READING)
    except KeyboardInterrupt as error:
        done = ", ".join(results) or "none"
        again = "the same command continues" if checkpoint else "the next evaluation starts anew"
        raise KeyboardInterrupt(f"interrupted at {name}; splits that are done: {done}; {again}") from error
    finally:
        model.train(was_training)
    if results and print_table:
        say(f"{summary_table(results)}\nthe figures are in {output_dir / 'summary.md'}, also as JSON and per sentence")
    return results


def model_settings(model) -> dict:
    """The settings of a loaded model that decide its masks, for `settings.json`."""
    config = model.config
    switches = [name for name in SWITCHES if not name.startswith("auxiliary_") and not name.endswith("_loss_weight")]
    return {
        "dtype": str(model.dtype).removeprefix("torch."),
        "attn_implementation": config._attn_implementation,
        **{name: getattr(config, name) for name in switches},
    }
