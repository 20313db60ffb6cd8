"""Figures from the per-unit JSONL of evaluations, without model or data: `self1e score`.

    self1e score runs/NAME/eval/*.jsonl                        # a table; with --json FILE every figure
    self1e score --compare A.jsonl B.jsonl                     # B minus A, its interval, and the units that differ
    self1e score --compare A.jsonl B.jsonl --pictures FOLDER --dataset_dir dataset

A comparison pairs the units of two evaluations of one split. Its interval is a paired percentile bootstrap: units are
drawn with replacement, and both evaluations are scored on the same draw.
"""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from self1e.data.samples import SampleError
from self1e.data.splits import load_split
from self1e.evaluation.segmentation.metrics import Unit, lisa, read_units, score
from self1e.evaluation.tables import markdown_table, percent, protocol_tables
from self1e.files import write_json
from self1e.flags import Parser, check_writable, check_writable_file, whole
from self1e.visualize import GROUND_TRUTH, PREDICTION, overlay, panel, save_worst_first

LEVEL, RESAMPLES, SEED = 0.95, 2000, 0
LONGEST_TEXT = 60  # characters of a sentence in the table


@dataclass(frozen=True)
class Comparison:
    """Two evaluations of the same units; `pairs` holds (unit of A, unit of B), those that B lost most on first.

    only_a, only_b: number of units that the other evaluation lacks; they are left out of all figures.
    """

    pairs: list[tuple[Unit, Unit]]
    only_a: int
    only_b: int

    @property
    def differing(self) -> list[tuple[Unit, Unit]]:
        """The pairs whose counts differ."""
        return [(a, b) for a, b in self.pairs if (a.I, a.U) != (b.I, b.U)]

    def figures(self) -> dict[str, dict]:
        """gIoU and cIoU of both, B minus A, and the interval of the difference; fractions."""
        a, b = (lisa(units) for units in zip(*self.pairs))
        return {
            name: {"a": a[name], "b": b[name], "difference": b[name] - a[name], "interval": interval}
            for name, interval in paired_bootstrap(self.pairs).items()
        }


def compare_units(first: Sequence[Unit], second: Sequence[Unit]) -> Comparison:
    """Pair the units of two evaluations by id.

    Raises ValueError when they share no unit, or when units of one id are about different sentences or targets.
    """
    others = {unit.id: unit for unit in second}
    pairs = [(unit, others[unit.id]) for unit in first if unit.id in others]
    if not pairs:
        raise ValueError("the two evaluations share no unit: they are of different splits")
    for a, b in pairs:
        if (a.image, a.text, a.target_pixels) != (b.image, b.text, b.target_pixels):
            raise ValueError(f"unit {a.id} is about another sentence or target in the two: they are of different data")
    pairs.sort(key=lambda pair: (pair[1].iou - pair[0].iou, pair[0].id))
    return Comparison(pairs, len(first) - len(pairs), len(second) - len(pairs))


def paired_bootstrap(pairs: Sequence[tuple[Unit, Unit]]) -> dict[str, list[float]]:
    """Percentile intervals of the differences, B minus A, of gIoU and cIoU: `{"giou": [low, high], ...}`."""
    counts = np.array([[(unit.I, unit.U, unit.iou) for unit in pair] for pair in pairs])  # pair, side, number
    generator, samples = np.random.default_rng(SEED), np.empty((RESAMPLES, 2))
    for sample in samples:
        I, U, ious = counts[generator.integers(len(pairs), size=len(pairs))].sum(0).T
        ciou = np.divide(I, U, out=np.ones(2), where=U > 0)
        sample[:] = (ious[1] - ious[0]) / len(pairs), ciou[1] - ciou[0]
    tails = [(1 - LEVEL) / 2, (1 + LEVEL) / 2]
    return dict(zip(("giou", "ciou"), np.quantile(samples, tails, axis=0).T.tolist()))


def score_table(results: Mapping[str, dict]) -> str:
    """The figures of each file in percent, `file -> metrics.score(units)`."""
    columns = {"gIoU": "giou", "cIoU": "ciou", **{f"Pr@0.{tenth}": f"pr@0.{tenth}" for tenth in range(5, 10)}}
    rows = [[name, str(of["n"]), *(percent(of[key]) for key in columns.values())] for name, of in results.items()]
    return markdown_table(["file", "n", *columns], rows) + protocol_tables(results)


def comparison_table(comparison: Comparison, most: int) -> str:
    """Both evaluations in percent, then the units that differ, those that B lost most on first."""
    rows = []
    for name, values in comparison.figures().items():
        change, low, high = (f"{100 * value:+.2f}" for value in (values["difference"], *values["interval"]))
        title = {"giou": "gIoU", "ciou": "cIoU"}[name]
        rows.append([title, percent(values["a"]), percent(values["b"]), change, f"{low} to {high}"])
    text = markdown_table(["figure", "A", "B", "B - A", "95% interval"], rows)
    differing = comparison.differing
    text += f"\n{len(differing)} of {len(comparison.pairs)} units differ"
    if comparison.only_a or comparison.only_b:
        text += f"; left out: {comparison.only_a} that only A holds, {comparison.only_b} that only B holds"
    text += ".\n"
    if differing:
        rows = [
            [a.id, a.text[:LONGEST_TEXT], f"{a.iou:.3f}", f"{b.iou:.3f}", f"{b.iou - a.iou:+.3f}"]
            for a, b in differing[:most]
        ]
        text += "\n" + markdown_table(["unit", "sentence", "IoU A", "IoU B", "B - A"], rows, text_columns=2)
        if len(differing) > most:
            text += f"\nThe other {len(differing) - most} are in the JSON; --most shows more.\n"
    return text


def comparison_record(comparison: Comparison, files: Sequence[Path]) -> dict:
    """What the table tells, and every unit that differs, for a JSON file."""
    return {
        "a": str(files[0]),
        "b": str(files[1]),
        "n": len(comparison.pairs),
        "only_a": comparison.only_a,
        "only_b": comparison.only_b,
        **comparison.figures(),
        "bootstrap": {"level": LEVEL, "resamples": RESAMPLES, "seed": SEED},
        "differing": [
            {"id": a.id, "image": a.image, "text": a.text, "iou_a": a.iou, "iou_b": b.iou, "difference": b.iou - a.iou}
            for a, b in comparison.differing
        ],
    }


def save_comparison_pictures(comparison: Comparison, split: str, dataset_dir: Path, folder: Path) -> Path:
    """Photo, ground truth and both predictions of the units that differ, those that B lost most on first.

    Returns the overview's path. Raises ValueError when a unit holds no mask or is not in the split.
    """
    places = {
        unit_id: (photo, row) for photo in load_split(split, dataset_dir) for row, unit_id in enumerate(photo.unit_ids)
    }
    pairs = comparison.differing
    for unit in (unit for pair in pairs for unit in pair):
        if unit.id not in places:
            raise ValueError(f"unit {unit.id} is not in {split} below {dataset_dir}")

    def draw(index: int) -> Image.Image:
        a, b = pairs[index]
        photo, row = places[a.id]
        image, targets = photo.load()
        height, width = targets.shape[1:]
        image = image.resize((width, height))
        pictures = {"photo": image, "ground truth": overlay(image, targets[row], [GROUND_TRUTH], enlarged=True)}
        for name, unit in (("A", a), ("B", b)):
            mask = unit.decode(height, width)
            pictures[f"{name}, IoU {unit.iou:.2f}"] = overlay(image, mask, [PREDICTION], enlarged=True)
        return panel(pictures, photo.sentences[row], f"{b.iou - a.iou:+.2f}")

    changes = [b.iou - a.iou for a, b in pairs]
    return save_worst_first(folder, changes, [a.id for a, _ in pairs], draw, label="change")


def split_of(path: Path) -> str:
    """The split whose units a JSONL holds, as the figures beside it say. Raises ValueError where they do not."""
    beside = path.with_suffix(".json")
    try:
        return json.loads(beside.read_text(encoding="utf-8"))["split"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{beside} does not say which split {path} is of; name it with --split") from error


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(prog="self1e score", description=__doc__)
    add = parser.add_argument
    add("files", nargs="+", type=Path, metavar="FILE.jsonl", help="units that an evaluation wrote")
    add("--compare", action="store_true", help="compare two files of one split: B minus A")
    add("--most", type=whole(0), default=20, help="units that differ in the table of a comparison")
    add("--json", type=Path, metavar="FILE", help="also write every figure, of a comparison all units that differ")
    add("--pictures", type=Path, metavar="FOLDER", help="draw the units that differ; needs --dataset_dir")
    add("--dataset_dir", type=Path, help="where the data of the split lies")
    add("--split", help="the split's name; default: what the .json beside the first file says")
    args = parser.parse_args(sys.argv[1:] if argv is None else argv)
    if args.compare and len(args.files) != 2:
        parser.error(f"--compare takes two files, not {len(args.files)}")
    if not args.compare and (args.pictures or args.split or args.dataset_dir):
        parser.error("--pictures, --dataset_dir and --split belong to --compare")
    if (args.pictures is None) != (args.dataset_dir is None):
        parser.error("--pictures and --dataset_dir go together")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Run with command line `argv`; returns the exit code. Errors are for `self1e.flags.guarded`."""
    args = parse_args(argv)
    if args.json:
        check_writable_file(args.json)
    if args.pictures:
        check_writable(args.pictures)
    if not args.compare:
        figures = {str(path): score(read_units(path)) for path in args.files}
        print(score_table(figures), end="")
        if args.json:
            write_json(args.json, figures, indent=2)
            print(f"\nthe figures are in {args.json}")
        return 0
    comparison = compare_units(*(read_units(path) for path in args.files))
    print(f"A: {args.files[0]}\nB: {args.files[1]}\ngIoU and cIoU in percent\n")
    print(comparison_table(comparison, args.most), end="")
    if args.json:
        write_json(args.json, comparison_record(comparison, args.files))
        print(f"\nevery unit that differs is in {args.json}")
    if args.pictures and comparison.differing:
        split = args.split or split_of(args.files[0])
        try:
            overview = save_comparison_pictures(comparison, split, args.dataset_dir, args.pictures)
            print(f"pictures, those that B lost most on first: {overview}")
        except SampleError as error:
            raise ValueError(error) from error
    return 0
