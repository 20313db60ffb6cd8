"""Evaluate a model on segmentation splits: every sentence once, on any number of processes.

Each photo is encoded once and serves all its sentences, at most `rows_per_forward` of them in a forward pass. Photos
are decoded and tiled in DataLoader workers. All ranks run the same sequence of forwards (ZeRO-3 gathers weights
layer by layer, so they must stay in step); surplus ones repeat a photo and their result is dropped.
"""

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from pycocotools import mask as rle_codec
from torch import Tensor
from torch.nn.functional import interpolate
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from self1e.data.paths import missing, require_paths
from self1e.data.sample import EvalImage, SampleError
from self1e.data.splits import MODELS, SplitEntry, file_stem, get_splits, load_split, split_paths
from self1e.evaluation.runtime import markdown_table, write_text
from self1e.evaluation.segmentation.metrics import Unit, count_pixels, iou, score, to_jsonl
from self1e.visualize import compare, save_worst_first

ANSWER = "[SEG]."
HIGH_RES_TILES = 4


@dataclass(frozen=True)
class Turn:
    """One photo of a rank's schedule: `forwards` passes over its rows; `counts` is False for a filler."""

    photo: int
    forwards: int
    counts: bool


def make_schedule(rows: Sequence[int], rank: int, world: int, rows_per_forward: int) -> list[Turn]:
    """Deal photos to ranks, those with most rows first; every rank gets as many turns of as many forwards.

    rows: sentences of each photo. Neighbours in the deal differ little in rows, so few forwards are surplus.
    """
    order = sorted(range(len(rows)), key=lambda photo: (-rows[photo], photo))
    turns = []
    for start in range(0, len(order), world):
        forwards = -(-rows[order[start]] // rows_per_forward)  # the first of a round has most rows
        place = start + rank
        turns.append(Turn(order[min(place, len(order) - 1)], forwards, counts=place < len(order)))
    return turns


class _Photos(Dataset):
    """Photo number -> (model inputs, masks).

    A broken photo comes back as its error for the main process to raise: passing through a worker would bury it.
    """

    def __init__(self, split: Sequence[EvalImage], processor, model_max_length: int, max_tiles: int):
        self.split, self.processor = split, processor
        self.model_max_length, self.max_tiles = model_max_length, max_tiles

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, number: int) -> tuple[dict[str, Tensor], Tensor] | Exception:
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
        return batch, torch.from_numpy(np.ascontiguousarray(masks))


def _as_is(item: Any) -> Any:
    return item


def _forward(model, batch: dict[str, Tensor], features, start: int, stop: int) -> list[Tensor]:
    """Mask logits (h, w) of rows start..stop, their common padding trimmed."""
    length = int(batch["attention_mask"][start:stop].sum(1).max())
    rows = {name: batch[name][start:stop, :length] for name in ("input_ids", "attention_mask")}
    out = model(**rows, row_image=batch["row_image"][start:stop], image_features=features)
    return [logits[-1] for logits in out.mask_logits]  # the answer's [SEG] is the last of its row


def predict_photo(
    model, batch: dict[str, Tensor], size: tuple[int, int], *, rows_per_forward: int, forwards: int
) -> Tensor:
    """Foreground of all rows of one photo: bool (rows, H, W) on the model's device.

    batch: the processor's output for the photo, without labels. size: (H, W) of the masks. forwards: passes to run;
    those beyond the photo's rows repeat the last one, and its result is dropped.
    """
    batch = {name: value.to(model.device) for name, value in batch.items()}
    features = model.encode_images(batch["pixel_values"], batch["tile_grids"])
    rows, masks = len(batch["input_ids"]), []
    starts = range(0, rows, rows_per_forward)
    for step in range(forwards):
        start = starts[min(step, len(starts) - 1)]
        logits = _forward(model, batch, features, start, min(start + rows_per_forward, rows))
        if step < len(starts):
            full = (interpolate(x.float()[None, None], size, mode="bilinear", align_corners=False) for x in logits)
            masks += [x[0, 0] > 0 for x in full]
    return torch.stack(masks)


def encode_mask(mask: Tensor) -> dict:
    """bool (H, W) -> COCO's compressed RLE, a few hundred bytes."""
    return rle_codec.encode(np.asfortranarray(mask.cpu().numpy(), dtype=np.uint8))


def make_units(photo: EvalImage, entry: SplitEntry, masks: Tensor, targets: Tensor) -> list[Unit]:
    """Count one photo: its units from predicted masks, bool (n, H, W), and targets, uint8 (n, H, W)."""
    counts = count_pixels(masks, targets)
    units = []
    for row, unit_id in enumerate(photo.unit_ids):
        marks = {}
        if entry.protocol == "rela":
            marks["no_target"] = photo.no_target[row]
        if entry.protocol == "reasonseg":
            marks["is_sentence"] = photo.is_sentence[row]
        text = photo.prompts[row].removeprefix("<image>").strip()
        numbers = {name: values[row] for name, values in counts.items()}
        units.append(Unit(id=unit_id, image=photo.image_id, text=text, **numbers, **marks))
    return units


def _ranks() -> tuple[int, int]:
    """This process's rank and the number of ranks."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_available() and dist.is_initialized() else (0, 1)


def _gather(value: Any, world: int) -> list:
    """`value` of every rank, on every rank."""
    if world == 1:
        return [value]
    values = [None] * world
    dist.all_gather_object(values, value)
    return values


def _raise_together(error: Exception | None, device: torch.device) -> None:
    """Raise on all ranks what one of them met, so that none is left waiting for the others."""
    _, world = _ranks()
    failed = torch.tensor(int(error is not None), device=device)
    if world > 1:
        dist.all_reduce(failed)
    if failed:
        raise next(error for error in _gather(error, world) if error is not None)


def _on_main(action: Callable[[], Any], device: torch.device) -> None:
    """Run `action` on rank 0 while the others wait; its OSError (full disk, no permission) is raised on all."""
    error = None
    if _ranks()[0] == 0:
        try:
            action()
        except OSError as caught:
            error = caught
    _raise_together(error, device)


@torch.no_grad()
def evaluate_units(
    model,
    processor,
    split: Sequence[EvalImage],
    entry: SplitEntry,
    *,
    workers: int = 4,
    rows_per_forward: int = 16,
    model_max_length: int = 512,
    high_res: bool = False,
    keep_masks: bool = False,
    title: str = "",
) -> tuple[list[Unit], list[dict]]:
    """Units of a whole split in its order, gathered on every rank; with `keep_masks` also each prediction as RLE.

    Raises SampleError for a broken photo or annotation, ValueError for a sentence that does not fit
    `model_max_length`; both name the photo.
    """
    rank, world = _ranks()
    turns = make_schedule([len(photo.unit_ids) for photo in split], rank, world, rows_per_forward)
    loader = DataLoader(
        _Photos(split, processor, model_max_length, HIGH_RES_TILES if high_res else 1),
        sampler=[turn.photo for turn in turns],
        batch_size=None,
        collate_fn=_as_is,
        num_workers=min(workers, len(turns)),
        generator=torch.Generator(),  # or the loader would draw from the global one, and training after it change
    )
    found: dict[int, tuple[list[Unit], list[dict]]] = {}  # photo -> its units, their masks
    I = U = 0
    bar = tqdm(zip(turns, loader), total=len(turns), desc=title, unit="photo", disable=rank != 0)
    for turn, item in bar:
        _raise_together(item if isinstance(item, Exception) else None, model.device)
        batch, targets = item
        size = tuple(targets.shape[1:])
        masks = predict_photo(model, batch, size, rows_per_forward=rows_per_forward, forwards=turn.forwards)
        if not turn.counts:
            continue
        units = make_units(split[turn.photo], entry, masks, targets.to(masks.device))
        found[turn.photo] = units, [encode_mask(mask) for mask in masks] if keep_masks else []
        I, U = I + sum(unit.I for unit in units), U + sum(unit.U for unit in units)
        bar.set_postfix(cIoU=f"{iou(I, U):.3f}", refresh=False)
    parts = _gather(found, world)
    found = {photo: result for part in parts for photo, result in part.items()}
    assert len(found) == sum(map(len, parts)) == len(split), "a photo is lost or counted twice"
    ordered = [found[photo] for photo in range(len(split))]
    return [unit for units, _ in ordered for unit in units], [rle for _, masks in ordered for rle in masks]


def _save(name: str, results: dict[str, dict], units: list[Unit], output_dir: Path) -> None:
    """Write the two files of split `name`, and the summary so far."""
    write_text(output_dir / f"{file_stem(name)}.jsonl", to_jsonl(units))
    write_text(output_dir / f"{file_stem(name)}.json", json.dumps(results[name], indent=2) + "\n")
    write_text(output_dir / "summary.json", json.dumps(results, indent=2) + "\n")
    write_text(output_dir / "summary.md", summary_table(results))


def _save_pictures(split: Sequence[EvalImage], units: list[Unit], masks: list[dict], folder: Path) -> None:
    places = [(photo, row) for photo in split for row in range(len(photo.unit_ids))]

    def draw(index: int):
        photo, row = places[index]
        image, targets = photo.load()
        image = image.resize(targets.shape[:0:-1])  # annotations are not always at the photo's size
        prediction = rle_codec.decode(masks[index]).astype(bool)
        return compare(image, targets[row], prediction, photo.sentences[row], units[index].iou)

    overview = save_worst_first(folder, [unit.iou for unit in units], [unit.id for unit in units], draw)
    tqdm.write(f"pictures, worst first: {overview}")


def evaluate_splits(
    model,
    processor,
    splits: Iterable[str],
    *,
    dataset_dir: str | Path,
    output_dir: str | Path,
    workers: int = 4,
    rows_per_forward: int = 16,
    model_max_length: int = 512,
    high_res: bool = False,
    visualize: bool = False,
    skip_missing: bool = False,
) -> dict[str, dict]:
    """Score `model` on `splits`; write `<split>.json`, `<split>.jsonl` and `summary.md`, `summary.json`.

    Args:
        model: `Self1EForSegmentation` on its device; put into evaluation mode, and back afterwards.
        splits: names of `SPLITS`, or with one of `PREFIXES`.
        dataset_dir: root of the segmentation data. output_dir: made when absent; rank 0 writes.
        workers: decoding processes a rank. rows_per_forward: sentences of a photo in one pass.
        model_max_length: tokens a row may have. high_res: up to 4 tiles a photo.
        visualize: pictures of the worst sentences in `<output_dir>/<split>/`, and an overview.
        skip_missing: leave out splits whose data is absent, with a message, instead of raising.

    Returns split -> figures (`mask_metrics.score`), the same on every rank.

    Raises ValueError (unknown split, sentence too long), FileNotFoundError (all absent data in one message),
    SampleError (a broken photo). Splits finished before an error keep their files.
    """
    entries, output_dir = get_splits(splits), Path(output_dir)
    say = tqdm.write if _ranks()[0] == 0 else lambda text: None
    absent = missing(split_paths(entries, dataset_dir))
    if not skip_missing:
        require_paths(absent)
    for name, path in dict(reversed(absent)).items():  # the first missing path of each
        say(f"skipped {name}: {path} is absent")
    available = {name: load_split(name, dataset_dir) for name in entries if name not in dict(absent)}
    _on_main(partial(output_dir.mkdir, parents=True, exist_ok=True), model.device)
    was_training, results = model.training, {}
    model.eval()
    for name, split in available.items():
        units, masks = evaluate_units(
            model, processor, split, entries[name], workers=workers, rows_per_forward=rows_per_forward,
            model_max_length=model_max_length, high_res=high_res, keep_masks=visualize, title=name,
        )  # fmt: skip
        results[name] = {"split": name, **score(units)}
        _on_main(partial(_save, name, results, units, output_dir), model.device)
        if visualize:
            _on_main(partial(_save_pictures, split, units, masks, output_dir / file_stem(name)), model.device)
    model.train(was_training)
    if results:
        say(summary_table(results))
    return results


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f}"


def summary_table(results: dict[str, dict]) -> str:
    """Ours beside the published figures, in percent, and the figures that only some benchmarks have."""
    entries = get_splits(results)
    title = {name: name.replace("|", " ") for name in results}  # "|" would end a cell
    rows = []
    for name, figures in results.items():
        published = entries[name].published
        theirs = (" / ".join(f"{value:.1f}" for value in published.get(model, ())) or "-" for model in MODELS)
        rows.append([title[name], str(figures["n"]), _percent(figures["giou"]), _percent(figures["ciou"]), *theirs])
    header = ["split", "n", "gIoU", "cIoU", *(f"published {model}" for model in MODELS)]
    text = markdown_table(header, rows) + "\nPublished: cIoU; on ReasonSeg gIoU / cIoU.\n"

    rela = [(name, figures["rela"]) for name, figures in results.items() if "rela" in figures]
    if rela:
        columns = {"gIoU": "giou", "cIoU": "ciou", "Pr@0.7": "pr@0.7", "Pr@0.8": "pr@0.8", "Pr@0.9": "pr@0.9"}
        columns |= {"N-acc": "n_acc", "T-acc": "t_acc"}
        rows = [[title[name], *(_percent(figures[key]) for key in columns.values())] for name, figures in rela]
        text += "\n" + markdown_table(["ReLA protocol", *columns], rows)
    reasoning = [(name, figures) for name, figures in results.items() if "bootstrap" in figures]
    if reasoning:
        rows = []
        for name, figures in reasoning:
            intervals = [" to ".join(map(_percent, figures["bootstrap"][key])) for key in ("giou", "ciou")]
            parts = [f"{_percent(figures[q]['giou'])} / {_percent(figures[q]['ciou'])}" for q in ("short", "long")]
            rows.append([title[name], *intervals, *parts])
        header = ["reasoning", "gIoU, 95% interval", "cIoU, 95% interval", "short gIoU / cIoU", "long gIoU / cIoU"]
        text += "\n" + markdown_table(header, rows)
    return text
