"""Check data before training on it: read every record as training and evaluation do, count, list what is wrong.

    self1e check-data dataset                      # every set of the tree that is there; VQA sets in data/
    self1e check-data own/train.csv                # own data: CSV, JSONL, COCO-style JSON, or a folder with one CSV
    self1e check-data dataset --limit 500          # a first look: 500 records of each set, evenly spread
    self1e check-data own/all.csv --split 0.1      # also writes own/all_train.csv and own/all_val.csv

Cost: every photo is decoded: 1,000 records take about 5 s on one core; with --limit 500 the whole tree takes minutes.
Result: a table (photos, sentences, masks, empty masks, problems, and how the files compare with the known totals), the
first problems of each set with their record or line, and a contact sheet of what training sees (photo, mask, text).
What is found: photos and masks that are missing or truncated; masks of another size than their photo, or that
contradict their record; empty phrases; control tokens such as [SEG] in a text; prompts that are too long; unknown
categories and classes; ids that occur twice.
Exit code: 0; 1 when something is wrong; 2 for wrong arguments.
"""

import argparse
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from PIL import Image
from tqdm import tqdm

from self1e.data.families import FAMILIES
from self1e.data.samples import Sample, TrainingSet, list_names, naming
from self1e.data.sets.custom import Custom, find_source, table_rows
from self1e.data.sets.expressions import ExpressionSet
from self1e.data.splits import SPLITS
from self1e.errors import UserError
from self1e.evaluation.loop import prepared
from self1e.evaluation.results import completeness, markdown_table
from self1e.files import check_writable, read_json, to_jsonl, write_json, write_text
from self1e.flags import Help
from self1e.model import prompts
from self1e.visualize import grid, overlay, panel

SHEET = Path("runs/check_data/contact_sheet.png")  # git ignores `runs`
LISTED = 10  # problems printed per set
CELL = 560  # pixels of a picture on the sheet
IN_WORKERS = 64  # records of a set from which on worker processes read it
IMAGE_TOKENS, TEMPLATE_TOKENS = 256, 40  # of a conversation, besides what is asked: one tile; roles and templates
BYTES_PER_TOKEN = 5  # of UTF-8, about
INSTRUCTIONS = "", prompts.VQA_INSTRUCTION, prompts.VIZWIZ_INSTRUCTION  # behind a question
TEMPLATES = *prompts.SHORT_QUESTIONS, *prompts.LONG_QUESTIONS, *(prompts.IMAGE_TAG + x for x in INSTRUCTIONS)
EMPTY_QUESTIONS = {""} | {prompts.visible(template.format("")) for template in TEMPLATES}
Read = Callable[[Any, int], Sample | None]  # record of a set -> its sample; None without a label


def read_sample(data: TrainingSet, number: int) -> Sample | None:
    return data.sample(number, np.random.default_rng(number))


def read_unit(data: ExpressionSet, number: int) -> Sample:
    unit = data[number]
    with naming(data.id(number)):
        image, masks = unit.load()
    return Sample(data.id(number), image, [[each.text.strip()] for each in unit.expressions], list(masks[:, None]))


@dataclass
class Source:
    """A set or split, and what was found in it."""

    name: str
    records: int = 0
    photos: int = 0
    problems: list[str] = field(default_factory=list)
    totals: str = "-"  # how it compares with the known totals
    checked: int = 0
    counts: np.ndarray = field(default_factory=lambda: np.zeros(3, int))  # sentences, masks, empty masks
    pictures: list[Image.Image] = field(default_factory=list)


def sets_of(args: argparse.Namespace) -> Iterator[tuple[str, TrainingSet, Read]]:
    """(name, set, how it is read) of own data, or of a tree's training sets and evaluation splits."""
    flags = {"dataset_dir": args.path, "data_dir": args.data_dir, "allow_outside": args.allow_outside}
    if not args.tree:
        yield str(args.path), Custom(f"custom|{args.path}", **flags, strict=False), read_unit  # also a faulty one
        return
    for name, training_set in (each for family in FAMILIES.values() for each in family.items()):
        yield name, training_set(name, **flags, num_classes_per_sample=10**9), read_sample
    for name, entry in SPLITS.items():
        yield name, entry.reader(name, **flags), read_unit


def check(source: Source, data: TrainingSet, read: Read, args: argparse.Namespace) -> bool:
    """Read `limit` records of a set, evenly spread, or all, and draw `samples` of them; False where it is absent.

    It is there if its first path is or, for a file of annotations, the folder of it; a file of questions (.jsonl) must
    be there itself, because an evaluation needs the same folder. Raises UserError when the set cannot be opened.
    """
    own = data.paths()[0]
    if not (own.parent if own.suffix in (".p", ".json") else own).exists():
        return False
    data.opened()
    source.records, source.photos = len(data), len(np.unique(data.image_keys()))
    source.problems, source.totals = list(data.problems), completeness(source.name, data)
    if not (source.records or source.problems):
        source.problems.append("its files hold no samples")
    source.checked = count = min(source.records, args.limit or source.records)
    numbers = np.linspace(0, source.records - 1, count).astype(int).tolist()
    drawn = {numbers[k] for k in np.random.default_rng(0).permutation(count)[: args.samples]}
    examine = partial(examined, source.name, data, read, drawn, args.model_max_length)
    workers = args.workers if count >= IN_WORKERS else 0
    records = prepared(numbers, examine, workers=workers, broken=lambda error: source.problems.append(str(error)))
    bar: dict[str, Any] = {"total": count, "unit": " records", "leave": False, "delay": 1, "disable": None}
    for _, (counts, problems, pictures) in tqdm(records, source.name, **bar):
        source.counts += counts
        source.problems += problems
        source.pictures += pictures
    return True


def examined(
    name: str, data: TrainingSet, read: Read, drawn: set[int], max_length: int, number: int
) -> tuple[list[int], list[str], list[Image.Image]]:
    """What a record adds to the counts, problems and pictures of its set; pictures are made of those in `drawn`."""
    known = len(data.problems)  # the set says more while it is read
    sample = read(data, number)
    if sample is None:  # in training the next photo serves in its place
        return [0, 0, 0], [], []
    masks = [mask for group in sample.masks for mask in group]
    counts = [len(sample.conversations), len(masks), sum(not (mask == 1).any() for mask in masks)]
    found = dict.fromkeys([*data.problems[known:], *problems_of(sample, max_length)])
    pictures = [picture(name, sample, number)] if number in drawn and sample.conversations else []
    return counts, [f"{sample.id}: {problem}" for problem in found], pictures


def problems_of(sample: Sample, max_length: int) -> Iterator[str]:
    """Empty texts, masks of another size than their photo, and prompts whose [SEG] the length limit would cut."""
    width, height = sample.image.size
    for turns, masks in zip(sample.conversations, sample.masks):
        if prompts.visible(turns[0]) in EMPTY_QUESTIONS:
            yield "a phrase is empty"
        if not all(map(prompts.visible, turns[1:])):
            yield "an answer is empty"
        if not len(masks):
            continue
        if masks.shape[1:] != (height, width):
            yield f"the mask's size is {masks.shape[2]} x {masks.shape[1]}, the photo {width} x {height} pixels"
        tokens = len(" ".join(turns).encode(errors="replace")) // BYTES_PER_TOKEN
        if tokens > max_length - IMAGE_TOKENS - TEMPLATE_TOKENS:
            yield (
                f"a prompt of about {tokens:,} tokens does not fit --model_max_length {max_length}, of which "
                f"the photo takes {IMAGE_TOKENS}: {turns[0].removeprefix(prompts.IMAGE_TAG).strip()[:60]!r} ..."
            )


def picture(name: str, sample: Sample, turn: int) -> Image.Image:
    """Photo, mask, question and answer of a conversation that shows something."""
    conversations = list(zip(sample.conversations, sample.masks))
    conversations = [each for each in conversations if (each[1] == 1).any()] or conversations
    turns, masks = conversations[turn % len(conversations)]
    pictures = {sample.id[-60:]: sample.image}
    if len(masks):
        size = masks.shape[:0:-1]  # annotations are not always at the photo's size
        pictures["mask" if (masks == 1).any() else "mask: nothing"] = overlay(sample.image.resize(size), masks)
    caption = " / ".join(turns).removeprefix(f"{prompts.IMAGE_TAG}\n")
    return panel(pictures, caption if len(caption) <= 300 else f"{caption[:300]} ...", name[-30:], width=CELL)


def table(sources: list[Source]) -> str:
    header = ["set", "read", "photos", "sentences", "masks", "empty", "problems", "of the known total"]
    rows = []
    for source in sources:
        read = f"{source.checked:,}" + (f" of {source.records:,}" if source.checked < source.records else "")
        numbers = [f"{number:,}" for number in (source.photos, *source.counts, len(source.problems))]
        rows.append([source.name.replace("|", " "), read, *numbers, source.totals])
    columns = -1 if all(source.totals == "-" for source in sources) else None  # own data has no known totals
    return markdown_table(header[:columns], [row[:columns] for row in rows])


def write_parts(source: Path, share: float) -> None:
    """Divide own data by photo into files of its format beside it, `_train` and `_val`, and print their names.

    share: of the photos that go to `_val`, chosen at random, the same ones each time. Raises UserError.
    """
    paths = [source.with_stem(f"{source.stem}_{part}") for part in ("train", "val")]
    if there := [str(path) for path in paths if path.exists()]:
        raise UserError(f"{there[0]} exists; remove it before a new split")
    suffix = source.suffix.lower()
    content = read_json(source, dict) if suffix == ".json" else {}
    records = content.get("images") or [row for _, row in table_rows(source)]
    named = (str(record["file_name" if content else "image"]).strip() for record in records)
    photos = pd.Series(map(os.path.normpath, named))  # `a.jpg` and `./a.jpg` are one
    names = np.array(sorted(set(photos)))
    count = round(share * len(names))
    if not 0 < count < len(names):
        raise UserError(f"--split {share} of {len(names)} photos leaves a part without any")
    val = photos.isin(np.random.default_rng(0).permutation(names)[:count])
    for path, part in zip(paths, (~val, val)):
        own = [record for record, chosen in zip(records, part) if chosen]
        if suffix == ".json":
            ids = {image["id"] for image in own}
            annotations = [each for each in content["annotations"] if each["image_id"] in ids]
            write_json(path, content | {"images": own, "annotations": annotations}, indent=None)
        else:
            write_text(path, pd.DataFrame(own).to_csv(index=False) if suffix == ".csv" else to_jsonl(own))
        print(f"{path}: {photos[part].nunique():,} photos")


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("self1e check-data", None, __doc__, formatter_class=Help, allow_abbrev=False)
    add = parser.add_argument
    add("path", metavar="PATH", type=Path, help="the tree's dataset folder, or own data (file or folder)")
    add("--data_dir", type=Path, help="VQA sets of the tree; unset: the folder data beside PATH")
    add("--output", type=Path, default=SHEET, help="the contact sheet")
    add("--samples", type=int, help="pictures per set on it, 0 for no sheet; unset: 2, and 12 of own data")
    add("--limit", type=int, help="records read of each set at most, evenly spread; unset: all")
    add("--split", type=float, help="share of the photos of own data for a _val file; the others go to _train")
    add("--model_max_length", type=int, default=512, help="of training: the most tokens of a conversation")
    add("--allow_outside", action="store_true", help="take files that annotations name outside their folder")
    add("--workers", type=int, default=min(16, os.cpu_count() or 1), help="processes that read")
    args = parser.parse_args(argv)
    if not args.path.exists():
        parser.error(f"{args.path} does not exist")
    if args.output.suffix.lower() not in Image.registered_extensions():
        parser.error(f"--output {args.output}: expected a picture's name, such as {args.output / 'contact_sheet.png'}")
    if min(args.limit or 0, args.samples or 0) < 0:
        parser.error("--limit and --samples are numbers of records")
    args.tree = args.path.is_dir() and not list_names(args.path, ".csv")
    if args.split is not None and args.tree:
        parser.error("--split divides own data; the sets of the tree have their splits")
    args.samples = (2 if args.tree else 12) if args.samples is None else args.samples
    args.data_dir = args.data_dir or args.path.resolve().parent / "data"
    return args


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_arguments(argv)
    if args.samples:
        check_writable(args.output.parent)
    sources, absent = [], []
    for name, data, read in sets_of(args):
        source = Source(name)
        try:
            if not check(source, data, read, args):
                absent.append(name)
                continue
        except UserError as error:
            source.problems.append(str(error))
        sources.append(source)
        if source.problems:
            more = len(source.problems) - LISTED
            print(f"\n{name}:", *source.problems[:LISTED], *[f"and {more:,} more"] * (more > 0), sep="\n  ")
    if not any(source.checked for source in sources):
        known = "the folder that holds ade20k, ..., a file of own data, or a folder with one .csv"
        print(f"nothing to check in {args.path}: name {known}", file=sys.stderr)
        return 1
    print(f"\n{table(sources)}")
    if absent:
        print(f"not there: {', '.join(absent)}")
    if pictures := [picture for source in sources for picture in source.pictures]:
        grid(pictures, 4, cell=CELL).save(args.output)
        print(f"look at {args.output}")
    problems = sum(len(source.problems) for source in sources)
    print(f"problems: {problems:,}" if problems else "no problems found")
    if args.split is not None and not problems:
        write_parts(find_source(args.path), args.split)
    return 1 if problems else 0
