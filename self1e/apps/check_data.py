"""Check data before training on it: read every record as training and evaluation do, count, list what is wrong.

    self1e check-data dataset                 # every set of the tree that is there; VQA sets in data/
    self1e check-data own/train.csv           # own data: CSV, COCO-style JSON, or a folder with one CSV
    self1e check-data dataset --limit 500     # a first look: 500 records of each set, evenly spread

Cost: every photo is decoded: 1,000 records take about 5 s a core; with --limit 500 the whole tree takes minutes.
Result: a table (photos, sentences, masks, empty masks, problems), the first problems of each set with their record or
line, and a contact sheet of what training sees (photo, mask, question). What is found: photos and masks that are
missing or truncated, a mask of another size than its photo, an empty phrase, a polygon outside the photo, an unknown
category or class, ids that occur twice, and tokens such as [SEG] in a text.
Exit code: 0; 1 when something is wrong; 2 for wrong arguments.
"""

import argparse
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial, singledispatch
from itertools import islice
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from self1e.data.index import CocoIndex, open_index, read_coco
from self1e.data.loading import TRAINING_SETS, SampleError
from self1e.data.paths import missing
from self1e.data.sample import EvalImage, TrainingSet
from self1e.data.sets.custom import CustomData, evaluation_image
from self1e.data.sets.reasoning import ReasoningSplit, ReasonSeg, read_record
from self1e.data.sets.referring import ReferringSplit, ReferringTrain
from self1e.data.sets.semantic import PartSet
from self1e.data.splits import SPLITS, load_split, split_paths
from self1e.evaluation.tables import markdown_table
from self1e.evaluation.vqa.base import Question
from self1e.evaluation.vqa.registry import VQA_BENCHMARKS
from self1e.model import prompts
from self1e.visualize import grid, overlay, panel

SHOWN = 10  # problems printed a set
CELL = 560  # pixels of a picture on the sheet
ALL_ROWS = 10**9  # sentences of a photo: all of them
FOLDERS = ("ade20k", "coco", "cocostuff", "llava_dataset", "mapillary", "reason_seg", "refer_seg", "vlpart")
# What makes a set present; anything else that it needs must then be there, too.
MARKS = {
    "ade20k": "ade20k", "cocostuff": "cocostuff", "mapillary": "mapillary", "paco_lvis": "vlpart/paco",
    "pascal_part": "vlpart/pascal_part", "ReasonSeg": "reason_seg/ReasonSeg/train",
    "llava_instruct_150k": "llava_dataset", **{name: f"refer_seg/{name}" for name in TRAINING_SETS["refer_seg"]},
}  # fmt: skip
EMPTY_QUESTIONS = {
    " ".join(question.split())
    for question in (
        *(template.format("") for template in prompts.SHORT_QUESTIONS + prompts.LONG_QUESTIONS),
        *(f"{prompts.IMAGE_TAG}{end}" for end in ("", prompts.VQA_INSTRUCTION, prompts.VIZWIZ_INSTRUCTION)),
    )
}


# --------------------------------------------------------------------------------------------------------- reading


@dataclass
class Seen:
    """One record as it was read: (turns, masks uint8 (n, H, W)) a row; `problems` of its annotation."""

    id: str
    image: Image.Image
    rows: list[tuple[list[str], np.ndarray]]
    problems: list[str] = field(default_factory=list)


@dataclass
class Source:
    """A set, split or benchmark: `read(number)` gives one of its `records` or raises SampleError."""

    name: str
    records: int = 0
    photos: int = 0
    read: Callable[[int], Seen] | None = None
    problems: list[str] = field(default_factory=list)


def training_source(name: str, data: TrainingSet) -> Source:
    """Everything on disk, not only the records that a cap lets take part."""

    def read(item: int) -> Seen:
        sample = data.read(item, np.random.default_rng(item))
        if sample is None:  # no label: the next photo serves in its place
            return Seen(f"{name}/{item}", Image.new("RGB", (1, 1)), [])
        problems = [
            f"{what} is empty"
            for row in sample.conversations
            for what, empty in (("a phrase", " ".join(row[0].split()) in EMPTY_QUESTIONS), ("an answer", "" in row))
            if empty
        ]
        rows = list(zip(sample.conversations, sample.masks))
        return Seen(sample.id, sample.image, rows, problems + polygon_problems(data, item, sample.image))

    keys = data.keys()
    return Source(name, len(keys), len(np.unique(keys)), read, duplicates(data))


def evaluation_source(name: str, data: ReferringSplit | ReasoningSplit | CustomData) -> Source:
    def read(item: int) -> Seen:
        unit: EvalImage = evaluation_image(data, item) if isinstance(data, CustomData) else data[item]
        problems = ["a phrase is empty" for sentence in unit.sentences if not sentence.strip()]
        problems += [f"unit {id} occurs twice" for id, times in Counter(unit.unit_ids).items() if times > 1]
        image, masks = unit.load()
        rows = [([text.strip()], mask[None]) for text, mask in zip(unit.sentences, masks)]
        return Seen(unit.image_id, image, rows, problems + polygon_problems(data, item, image))

    problems = data.problems() if isinstance(data, CustomData) else []
    return Source(name, len(data), len(np.unique(data.keys())), read, problems)


def question_source(name: str, questions: list[Question]) -> Source:
    def read(item: int) -> Seen:
        question = questions[item]
        image = question.open_image()
        return Seen(f"{name}/{question.id}", image, [([question.prompt], np.zeros((0, *image.size[::-1]), np.uint8))])

    return Source(name, len(questions), len({question.image for question in questions}), read)


def duplicates(data: TrainingSet) -> list[str]:
    """Ids that occur twice in the COCO-style file of a set, and annotations of no image."""
    if not isinstance(data, (PartSet, ReferringTrain)):
        return []
    path = (data if isinstance(data, PartSet) else data.data).coco.path
    index = open_index(path, read_coco)
    ids = {what: index.array(f"{what}_ids") for what in ("image", "annotation", "owner")}  # sorted
    found = []
    for what in "image", "annotation":
        twice = np.unique(ids[what][1:][np.diff(ids[what]) == 0])
        found += [f"{path.name}: {what} id {id} occurs twice" for id in twice]
    lost = np.setdiff1d(ids["owner"], ids["image"])
    return found + [f"{path.name}: annotations of image {id}, which is not among its images" for id in lost]


# -------------------------------------------------------------------------------------------------------- polygons


def polygon_problems(data, item: int, image: Image.Image) -> list[str]:
    """Annotations whose polygons leave the photo by more than a rounding error: 1% of a side, at least 2 pixels."""
    found = []
    for place, points, width, height in polygons(data, item, image):
        slack = max(2, 0.01 * max(width, height))
        low, high = points.min(0), points.max(0) - (width, height)
        if min(low) < -slack or max(high) > slack:
            found.append(
                f"{place}: a polygon reaches ({points[:, 0].min():.0f} to {points[:, 0].max():.0f}, "
                f"{points[:, 1].min():.0f} to {points[:, 1].max():.0f}), outside {width} x {height} pixels"
            )
    return found


Polygons = Iterator[tuple[str, np.ndarray, int, int]]


@singledispatch
def polygons(data, item: int, image: Image.Image) -> Polygons:
    """(place, points (n, 2), width, height) of every polygon of a record."""
    yield from ()


def coco_polygons(place: str, segmentation: list | dict, width: int, height: int) -> Polygons:
    for part in segmentation if isinstance(segmentation, list) else []:
        if isinstance(part, list) and len(part) >= 2:
            yield place, np.reshape(part[: len(part) // 2 * 2], (-1, 2)), width, height


def annotation_polygons(coco: CocoIndex, row: int, annotations: Iterable[dict]) -> Polygons:
    _, height, width = coco.image(row)
    for annotation in annotations:
        yield from coco_polygons(f"annotation {annotation['id']}", annotation["segmentation"], width, height)


@polygons.register
def _(data: PartSet, item: int, image: Image.Image) -> Polygons:
    rows = data.coco.annotation_rows(int(data.image_ids[item]))
    yield from annotation_polygons(data.coco, item, map(data.coco.annotation_at, rows))


@polygons.register(ReferringTrain)
@polygons.register(ReferringSplit)
def _(data, item: int, image: Image.Image) -> Polygons:
    data = data.data
    wanted = sorted({id for _, ids, _ in data.expressions(item) for id in ids} - {-1})
    row = int(data.coco.image_rows(data.image_ids[item : item + 1])[0])
    yield from annotation_polygons(data.coco, row, map(data.coco.annotation, wanted))


@polygons.register(ReasonSeg)
@polygons.register(ReasoningSplit)
def _(data, item: int, image: Image.Image) -> Polygons:
    photo = data.photos[item]
    for number, shape in enumerate(read_record(photo, photo.name)["shapes"]):
        if shape["points"]:
            yield f"shapes[{number}]", np.array(shape["points"]), image.width, image.height


@polygons.register
def _(data: CustomData, item: int, image: Image.Image) -> Polygons:
    for number in {number for _, numbers in data.expressions(item) for number in numbers}:
        segmentation, place = data.segmentation(number)
        size = data.size(item)
        if size is not None:
            yield from coco_polygons(place, segmentation, size[1], size[0])


# ----------------------------------------------------------------------------------------------------------- tree


def tree_sources(dataset_dir: Path, data_dir: Path) -> Iterator[Source | str]:
    """Training sets, evaluation splits and VQA benchmarks; the bare name of one that is absent."""
    for family, sets in TRAINING_SETS.items():
        for name, training_set in sets.items():
            mark = dataset_dir / MARKS[name] if name in MARKS else data_dir / training_set.file
            if not mark.exists():
                yield name
                continue
            explained = family == "reason_seg" and (mark.parent / "explanatory" / "train.json").exists()
            options = {"explanatory": 0} if explained else {}
            load = partial(training_set, dataset_dir, data_dir, rows=ALL_ROWS, seed=0, **options)
            yield open_source(name, load, training_source, training_set.paths(dataset_dir, data_dir, **options))
    for name in SPLITS:
        if missing(split_paths([name], dataset_dir)):
            yield name
        else:
            yield open_source(name, partial(load_split, name, dataset_dir), evaluation_source)
    for name, benchmark in VQA_BENCHMARKS.items():
        try:
            questions = benchmark.questions(data_dir)
        except FileNotFoundError:
            yield name
        else:
            yield question_source(f"{name} (evaluation)", questions)


def open_source(name: str, load: Callable, source: Callable, paths: Iterable[Path] = ()) -> Source:
    """The set, or one that holds nothing but the reason why it cannot be opened."""
    absent = [f"{path} is missing" for path in paths if not path.exists()]
    if absent:
        return Source(name, problems=absent)
    try:
        return source(name, load())
    except (ValueError, OSError) as error:
        return Source(name, problems=[str(error)])


# ---------------------------------------------------------------------------------------------------------- checks


@dataclass
class Report:
    """Counts over the records that were read, in the order of the table."""

    source: Source
    records: int = 0
    sentences: int = 0
    masks: int = 0
    empty: int = 0
    problems: list[str] = field(default_factory=list)
    pictures: list[Image.Image] = field(default_factory=list)


def without_template(turns: list[str], masks: int) -> list[str]:
    """The texts of a row without what our templates put there: the image's tag, and one [SEG] a mask."""
    return [
        turns[0].removeprefix(f"{prompts.IMAGE_TAG}\n"),
        *(text.replace(prompts.SEG, "", masks) for text in turns[1:]),
    ]


def problems_of(seen: Seen) -> list[str]:
    problems = list(seen.problems)
    for turns, masks in seen.rows:
        texts = without_template(turns, len(masks))
        problems += [f"{text!r} holds the reserved token {t}" for text in texts for t in prompts.RESERVED if t in text]
        if len(masks) and masks.shape[1:] != (seen.image.height, seen.image.width):
            size = f"{masks.shape[2]} x {masks.shape[1]}, the photo {seen.image.width} x {seen.image.height}"
            problems.append(f"the mask's size is {size} pixels")
    return [f"{seen.id}: {problem}" for problem in dict.fromkeys(problems)]


def read_safely(source: Source, item: int) -> Seen | str:
    """A record, or what is wrong with it."""
    try:
        return source.read(item)
    except SampleError as error:
        return str(error)


def check(source: Source, *, limit: int | None, samples: int, workers: int) -> Report:
    """Read `limit` records of a set, evenly spread, or all; draw `samples` of them."""
    report = Report(source, problems=list(source.problems))
    count = min(source.records, limit or source.records)
    items = np.linspace(0, source.records - 1, count).astype(int).tolist() if count else []
    drawn = set(np.random.default_rng(0).permutation(count)[:samples].tolist())
    waiting = iter(items)
    with ThreadPoolExecutor(workers) as pool, tqdm(total=count, desc=source.name, unit="record") as bar:
        # In portions: one submission of a million records would hold a million results.
        while portion := list(islice(waiting, 64)):
            for seen in pool.map(partial(read_safely, source), portion):
                if isinstance(seen, str):
                    report.problems.append(seen)
                else:
                    report.problems += problems_of(seen)
                    report.sentences += len(seen.rows)
                    report.masks += sum(len(masks) for _, masks in seen.rows)
                    report.empty += sum(not (mask == 1).any() for _, masks in seen.rows for mask in masks)
                    if report.records in drawn and seen.rows:
                        report.pictures.append(picture(source.name, seen, len(report.pictures)))
                report.records += 1
                bar.update()
    return report


def picture(name: str, seen: Seen, turn: int) -> Image.Image:
    """A row that shows something, picture after picture another one: photo, mask, what is asked and answered."""
    rows = [row for row in seen.rows if (row[1] == 1).any()] or seen.rows
    turns, masks = rows[turn % len(rows)]
    pictures = {seen.id[-60:]: seen.image}
    if len(masks):
        size = masks.shape[:0:-1]  # annotations are not always at the photo's size
        pictures["mask" if (masks == 1).any() else "mask: nothing"] = overlay(seen.image.resize(size), masks)
    caption = " / ".join(turns).removeprefix(f"{prompts.IMAGE_TAG}\n")
    return panel(pictures, caption if len(caption) <= 300 else f"{caption[:300]} ...", name[-30:], width=CELL)


def table(reports: list[Report]) -> str:
    rows = []
    for report in reports:
        some = report.records < report.source.records
        records = f"{report.records:,} of {report.source.records:,}" if some else f"{report.records:,}"
        counts = report.source.photos, report.sentences, report.masks, report.empty, len(report.problems)
        rows.append([report.source.name.replace("|", " "), records, *(f"{count:,}" for count in counts)])
    header = ["set", "records read", "photos", "sentences", "masks", "empty masks", "problems"]
    return markdown_table(header, rows)


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("path", metavar="PATH", type=Path, help="the tree's dataset folder, or own data (.csv, .json, folder)")
    add("--data_dir", type=Path, help="VQA sets of the tree; default: the folder data beside PATH")
    add("--kind", choices=("auto", "tree", "custom"), default="auto", help="auto: a tree holds folders like refer_seg")
    add("--output", type=Path, default=Path("contact_sheet.png"), help="the contact sheet")
    add("--samples", type=int, help="pictures a set on it; default: 2, and 12 of own data; 0: no sheet")
    add("--limit", type=int, help="records read of each set at most, evenly spread; default: all")
    add("--workers", type=int, default=os.cpu_count(), help="threads that read; default: one a core")
    args = parser.parse_args(argv)
    if not args.path.exists():
        parser.error(f"{args.path} does not exist")
    if args.kind == "auto":
        args.kind = "tree" if any((args.path / folder).is_dir() for folder in FOLDERS) else "custom"
    if args.samples is None:
        args.samples = 2 if args.kind == "tree" else 12
    if args.samples < 0 or args.workers < 1 or (args.limit is not None and args.limit < 1):
        parser.error("--samples must not be negative, --workers and --limit at least 1")
    args.data_dir = args.data_dir or args.path.resolve().parent / "data"
    return args


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_arguments(argv)
    if args.kind == "tree":
        sources = tree_sources(args.path, args.data_dir)
    else:
        sources = [open_source(str(args.path), partial(CustomData, args.path), evaluation_source)]
    reports, absent = [], []
    for source in sources:
        if isinstance(source, str):
            absent.append(source)
        else:
            reports.append(check(source, limit=args.limit, samples=args.samples, workers=args.workers))
    for report in (report for report in reports if report.problems):
        print(f"\n{report.source.name}:")
        print("\n".join(f"  {problem}" for problem in report.problems[:SHOWN]))
        if len(report.problems) > SHOWN:
            print(f"  and {len(report.problems) - SHOWN:,} more")
    print(f"\n{table(reports)}")
    if absent:
        print(f"not there: {', '.join(absent)}")
    pictures = [picture for report in reports for picture in report.pictures]
    if pictures:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        grid(pictures, 4, cell=CELL).save(args.output)
        print(f"look at {args.output}")
    problems = sum(len(report.problems) for report in reports)
    if not reports or not any(report.records for report in reports):
        print(f"nothing to check in {args.path}", file=sys.stderr)
        return 1
    print(f"{problems:,} problems" if problems else "no problems found")
    return 1 if problems else 0
