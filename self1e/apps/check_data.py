"""Check data before training on it: read every record as training and evaluation do, count, list what is wrong.

    self1e check-data dataset                 # every set of the tree that is there; VQA sets in data/
    self1e check-data own/train.csv           # own data: CSV, COCO-style JSON, or a folder with one CSV
    self1e check-data dataset --limit 500     # a first look: 500 records of each set, evenly spread

Cost: every photo is decoded: 1,000 records take about 5 s on one core; with --limit 500 the whole tree takes minutes.
Result: a table (photos, sentences, masks, empty masks, problems, and how the files compare with the known totals), the
first problems of each set with their record or line, and a contact sheet of what training sees (photo, mask, text).
What is found: photos and masks that are missing or truncated, a mask of another size than its photo, an empty phrase,
a polygon outside the photo, an unknown category or class, ids that occur twice, and tokens such as [SEG] in a text.
Exit code: 0; 1 when something is wrong; 2 for wrong arguments.
"""

import argparse
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from self1e.data.families import FAMILIES, DataConfig, SetChoice
from self1e.data.paths import missing
from self1e.data.samples import EvalImage, EvalSplit, Sample, SampleError, TrainingSet, check_sample
from self1e.data.sets.custom import CustomData, CustomSplit
from self1e.data.splits import SPLITS, load_split, split_paths
from self1e.data.totals import compare, counts
from self1e.errors import UserError
from self1e.evaluation.tables import markdown_table
from self1e.evaluation.vqa.base import Answer, MissingFile, Question, VQABenchmark
from self1e.evaluation.vqa.registry import VQA_BENCHMARKS
from self1e.flags import Parser, check_writable_file, counted, whole
from self1e.model import prompts
from self1e.visualize import grid, overlay, panel

SHEET = Path("runs/check_data/contact_sheet.png")  # git ignores `runs`
SHOWN = 10  # problems printed per set
CELL = 560  # pixels of a picture on the sheet
ALL_ROWS = 10**9  # sentences of a photo: all of them
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
    """One record as it was read: (turns, masks uint8 (n, H, W)) per row; `problems` of its annotation."""

    id: str
    image: Image.Image
    rows: list[tuple[list[str], np.ndarray]]
    problems: list[str] = field(default_factory=list)


@dataclass
class Source:
    """A set, split or benchmark: `read(number)` gives one of its `records` or raises SampleError.

    remarks:  what is odd in its files but has a settled meaning, and is no problem
    totals:   how it compares with the known totals
    """

    name: str
    records: int = 0
    photos: int = 0
    read: Callable[[int], Seen] | None = None
    problems: list[str] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)
    totals: str = "-"


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
        return Seen(sample.id, sample.image, list(zip(sample.conversations, sample.masks)), problems)

    photos = len(np.unique(data.image_keys()))
    return Source(name, len(data), photos, read, list(data.problems), totals=compare(name, counts(data)))


class NamedAlready(SampleError):
    """What is wrong with a record is among the problems of its source."""


class OwnData(CustomSplit):
    """Own data with its faults, for which an evaluation would refuse it."""

    def __init__(self, path: Path, *, allow_outside: bool = False):
        self.name = str(path)
        self.data = CustomData(path, allow_outside=allow_outside)
        self.problems = self.data.faults()

    def read(self, item: int) -> EvalImage:
        if not self.data.complete(item):
            raise NamedAlready(self.data.file_name(item), "a file is missing")
        return super().read(item)


def evaluation_source(name: str, data: EvalSplit) -> Source:
    def read(item: int) -> Seen:
        unit = data.read(item)
        problems = ["a phrase is empty" for sentence in unit.sentences if not sentence.strip()]
        problems += [f"unit {id} occurs twice" for id, times in Counter(unit.unit_ids).items() if times > 1]
        image, masks = unit.load()
        rows = [([text.strip()], mask[None]) for text, mask in zip(unit.sentences, masks)]
        return Seen(unit.image_id, image, rows, problems)

    photos = len(np.unique(data.image_keys()))
    return Source(name, len(data), photos, read, list(data.problems), totals=compare(name, counts(data)))


def question_source(name: str, questions: list[Question], problems: list[str]) -> Source:
    def read(item: int) -> Seen:
        question = questions[item]
        image = question.open_image()
        return Seen(f"{name}/{question.id}", image, [([question.prompt], np.zeros((0, *image.size[::-1]), np.uint8))])

    return Source(name, len(questions), len({question.image for question in questions}), read, problems)


def reference_problems(benchmark: VQABenchmark, questions: list[Question], data_dir: Path) -> list[str]:
    """What is wrong with the files that a benchmark is scored with: blank replies are scored, which reads them."""
    if benchmark.metric is None:
        return []
    try:
        benchmark.metric([Answer(question, "") for question in questions], data_dir)
    except UserError as error:
        return [str(error)]
    return []


# ----------------------------------------------------------------------------------------------------------- tree


def training_sets() -> Iterator[tuple[str, type[TrainingSet]]]:
    for family in FAMILIES.values():
        yield from family.sets.items()


def is_tree(path: Path) -> bool:
    """Whether a folder holds one of the folders of the sets; those of question sets are another folder's."""
    elsewhere = Path(os.devnull)
    marks = (training_set.paths(path, elsewhere)[0] for _, training_set in training_sets())
    return any((path / mark.relative_to(path).parts[0]).is_dir() for mark in marks if mark.is_relative_to(path))


def tree_sources(dataset_dir: Path, data_dir: Path, *, allow_outside: bool) -> Iterator[Source | str]:
    """Training sets, evaluation splits and VQA benchmarks; the bare name of one that is absent."""
    for name, training_set in training_sets():
        if not training_set.paths(dataset_dir, data_dir)[0].exists():
            yield name
            continue
        choice = SetChoice(training_set)
        config = DataConfig(dataset_dir, data_dir, conversations=ALL_ROWS, allow_outside=allow_outside)
        load = partial(choice.open, config)
        yield open_source(name, load, training_source, choice.paths(dataset_dir, data_dir))
    for name in SPLITS:
        if missing(split_paths([name], dataset_dir)):
            yield name
        else:
            load_one = partial(load_split, name, dataset_dir, allow_outside=allow_outside)
            yield open_source(name, load_one, evaluation_source)
    for name, benchmark in VQA_BENCHMARKS.items():
        try:
            questions = benchmark.questions(data_dir)
        except MissingFile:
            yield name
        except UserError as error:
            yield Source(name, problems=[str(error)])
        else:
            yield question_source(name, questions, reference_problems(benchmark, questions, data_dir))


def open_source(name: str, load: Callable, source: Callable, paths: Iterable[Path] = ()) -> Source:
    """The set, or one that holds nothing but the reason why it cannot be opened."""
    absent = [f"{path} is missing" for path in paths if not path.exists()]
    if absent:
        return Source(name, problems=absent)
    try:
        return source(name, load())
    except (UserError, ValueError, OSError) as error:
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


def problems_of(seen: Seen) -> list[str]:
    problems = list(seen.problems)
    for turns, masks in seen.rows:
        try:
            check_sample(Sample(seen.id, seen.image, [turns], [masks]))
        except SampleError as error:
            problems.append(error.cause)
        if len(masks) and masks.shape[1:] != (seen.image.height, seen.image.width):
            size = f"{masks.shape[2]} x {masks.shape[1]}, the photo {seen.image.width} x {seen.image.height}"
            problems.append(f"the mask's size is {size} pixels")
    return [f"{seen.id}: {problem}" for problem in dict.fromkeys(problems)]


def read_safely(source: Source, item: int) -> Seen | str | None:
    """A record, or what is wrong with it; None where the source's problems say so already."""
    assert source.read is not None  # a source without it has no records
    try:
        return source.read(item)
    except NamedAlready:
        return None
    except SampleError as error:
        return str(error)


def check(source: Source, *, limit: int | None, samples: int, workers: int) -> Report:
    """Read `limit` records of a set, evenly spread, or all; draw `samples` of them."""
    report = Report(source, problems=list(source.problems))
    count = min(source.records, limit or source.records)
    items = np.linspace(0, source.records - 1, count).astype(int).tolist() if count else []
    drawn = set(np.random.default_rng(0).permutation(count)[:samples].tolist())
    waiting = iter(items)
    progress = tqdm(total=count, desc=source.name, unit=" records", leave=False, disable=not count)
    with ThreadPoolExecutor(workers) as pool, progress as bar:
        # In portions: one submission of a million records would hold a million results.
        while portion := list(islice(waiting, 64)):
            for seen in pool.map(partial(read_safely, source), portion):
                if isinstance(seen, str):
                    report.problems.append(seen)
                elif seen is not None:
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
        painted = overlay(seen.image.resize(size), masks)
        pictures["mask" if (masks == 1).any() else "mask: nothing"] = painted
    caption = " / ".join(turns).removeprefix(f"{prompts.IMAGE_TAG}\n")
    return panel(pictures, caption if len(caption) <= 300 else f"{caption[:300]} ...", name[-30:], width=CELL)


def table(reports: list[Report]) -> str:
    rows = []
    for report in reports:
        some = report.records < report.source.records
        records = f"{report.records:,} of {report.source.records:,}" if some else f"{report.records:,}"
        counts = report.source.photos, report.sentences, report.masks, report.empty, len(report.problems)
        name, totals = report.source.name.replace("|", " "), report.source.totals.removeprefix("partly: ")
        rows.append([name, records, *(f"{count:,}" for count in counts), totals])
    header = ["set", "read", "photos", "sentences", "masks", "empty", "problems", "of the known total"]
    if all(report.source.totals == "-" for report in reports):  # own data
        header, rows = header[:-1], [row[:-1] for row in rows]
    return markdown_table(header, rows)


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(prog="self1e check-data", description=__doc__)
    add = parser.add_argument
    add("path", metavar="PATH", type=Path, help="the tree's dataset folder, or own data (.csv, .json, folder)")
    add("--data_dir", type=Path, help="VQA sets of the tree; default: the folder data beside PATH")
    add("--kind", choices=("auto", "tree", "custom"), default="auto", help="auto: a tree holds folders like refer_seg")
    add("--output", type=Path, default=SHEET, help=f"the contact sheet; default: {SHEET}")
    add("--samples", type=whole(0), help="pictures per set on it; default: 2, and 12 of own data; 0: no sheet")
    add("--limit", type=whole(1), help="records read of each set at most, evenly spread; default: all")
    add("--allow_outside", action="store_true", help="take files that annotations name outside their folder")
    add("--workers", type=whole(1), default=os.cpu_count(), help="threads that read; default: one per core")
    args = parser.parse_args(argv)
    if not args.path.exists():
        parser.error(f"{args.path} does not exist")
    if args.output.suffix.lower() not in Image.registered_extensions():
        parser.error(f"--output {args.output}: expected a picture's name, such as {args.output / 'contact_sheet.png'}")
    if args.kind == "auto":
        args.kind = "tree" if is_tree(args.path) else "custom"
    if args.samples is None:
        args.samples = 2 if args.kind == "tree" else 12
    args.data_dir = args.data_dir or args.path.resolve().parent / "data"
    return args


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_arguments(argv)
    if args.samples:
        check_writable_file(args.output)
    sources: Iterable[Source | str]
    if args.kind == "tree":
        sources = tree_sources(args.path, args.data_dir, allow_outside=args.allow_outside)
    else:
        load = partial(OwnData, args.path, allow_outside=args.allow_outside)
        sources = [open_source(str(args.path), load, evaluation_source)]
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
    read = any(report.records for report in reports)
    if read:
        print(f"\n{table(reports)}")
    for remark in dict.fromkeys(remark for report in reports for remark in report.source.remarks):
        print(remark)
    if absent:
        print(f"not there: {', '.join(absent)}")
    pictures = [picture for report in reports for picture in report.pictures]
    if pictures:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        grid(pictures, 4, cell=CELL).save(args.output)
        print(f"look at {args.output}")
    problems = sum(len(report.problems) for report in reports)
    if not read:
        near = next((path for path in (args.path / "dataset", args.path.absolute().parent) if is_tree(path)), None)
        hint = f"; did you mean {near}?" if near is not None and args.kind == "custom" else ""
        print(f"nothing to check in {args.path}{hint}", file=sys.stderr)
        return 1
    print(counted(problems, "problem") if problems else "no problems found")
    return 1 if problems else 0
