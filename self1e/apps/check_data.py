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
import json
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from PIL import Image
from torch.utils.data import DataLoader
from tqdm import tqdm

from self1e import Self1EProcessor
from self1e.data.families import FAMILIES, Choice
from self1e.data.paths import missing, require_paths
from self1e.data.samples import EvalSplit, PhotoSet, SampleError, TrainingSet, check_texts
from self1e.data.sets.custom import Custom, find_source
from self1e.data.splits import SPLITS, completeness, load_split, split_paths
from self1e.errors import UserError
from self1e.evaluation.tables import markdown_table
from self1e.evaluation.vqa.base import Answer, MissingFile, Question, VQABenchmark
from self1e.evaluation.vqa.registry import VQA_BENCHMARKS
from self1e.files import check_writable, read_json, write_json, write_text
from self1e.model import prompts
from self1e.visualize import grid, overlay, panel

SHEET = Path("runs/check_data/contact_sheet.png")  # git ignores `runs`
LISTED = 10  # problems printed per set
CELL = 560  # pixels of a picture on the sheet
ALL = 10**9  # conversations of a photo
IN_WORKERS = 64  # records of a set from which on worker processes read it
IMAGE_TOKENS, TEMPLATE_TOKENS = 256, 40  # of a conversation, besides what is asked: one tile; roles and templates
EMPTY_QUESTIONS = {
    " ".join(question.split())
    for question in (
        *(template.format("") for template in prompts.SHORT_QUESTIONS + prompts.LONG_QUESTIONS),
        *(f"{prompts.IMAGE_TAG}{end}" for end in ("", prompts.VQA_INSTRUCTION, prompts.VIZWIZ_INSTRUCTION)),
    )
}


@dataclass
class Record:
    """One record as it was read: the turns and the masks, uint8 (n, H, W), of each conversation."""

    id: str
    image: Image.Image
    conversations: list[tuple[list[str], np.ndarray]]
    problems: list[str] = field(default_factory=list)


@dataclass
class Source:
    """A set, split or benchmark, and what was found in it."""

    name: str
    records: int = 0
    photos: int = 0
    read: Callable[[int], Record | None] = lambda number: None  # None without a label; raises SampleError
    problems: list[str] = field(default_factory=list)
    totals: str = "-"  # how it compares with the known totals
    checked: int = 0
    counts: list[int] = field(default_factory=lambda: [0, 0, 0])  # sentences, masks, empty masks
    pictures: list[Image.Image] = field(default_factory=list)


def set_source(name: str, data: PhotoSet, read: Callable[[Any, int], Record | None]) -> Source:
    photos = len(np.unique(data.image_keys()))
    return Source(name, len(data), photos, partial(read, data), list(data.problems), completeness(name, data))


def read_sample(data: TrainingSet, number: int) -> Record | None:
    sample = data.sample(number, np.random.default_rng(number))
    if sample is None:  # the next photo serves in its place
        return None
    questions = [" ".join(turns[0].split()) for turns in sample.conversations]
    problems = ["a phrase is empty" for question in questions if question in EMPTY_QUESTIONS]
    problems += ["an answer is empty" for turns in sample.conversations if "" in turns]
    return Record(sample.id, sample.image, list(zip(sample.conversations, sample.masks)), problems)


def read_unit(data: EvalSplit, number: int) -> Record:
    unit = data[number]
    problems = ["a phrase is empty" for sentence in unit.sentences if not sentence.strip()]
    problems += [f"unit {id} occurs twice" for id, times in Counter(unit.unit_ids).items() if times > 1]
    image, masks = unit.load()
    conversations = [([text.strip()], mask[None]) for text, mask in zip(unit.sentences, masks)]
    return Record(data.id(number), image, conversations, problems)


def read_own(data: Custom, number: int) -> Record:
    known = len(data.doubts)
    record = read_unit(data, number)
    record.problems += data.doubts[known:]
    return record


def open_training_set(choice: Choice) -> Source:
    """Raises MissingFile where its first path is not there, nor, for a file of a set with masks, its folder."""
    own, segmentation = choice.paths()[0], choice.training_set.segmentation
    if not own.exists() and not (own.suffix and segmentation and own.parent.is_dir()):
        raise MissingFile(choice.name)
    require_paths([(choice.name, path) for path in choice.paths()])
    return set_source(choice.name, choice.open(), read_sample)


def open_split(name: str, dataset_dir: Path, allow_outside: bool) -> Source:
    if missing(split_paths([name], dataset_dir)):
        raise MissingFile(name)
    return set_source(name, load_split(name, dataset_dir, allow_outside=allow_outside), read_unit)


def open_benchmark(name: str, benchmark: VQABenchmark, data_dir: Path) -> Source:
    """A benchmark's questions, and what is wrong with the files that it is scored with. Raises MissingFile."""
    questions, problems = benchmark.questions(data_dir), []
    if benchmark.metric is not None:
        try:
            benchmark.metric([Answer(question, "") for question in questions], data_dir)  # reads its files
        except UserError as error:
            problems = [str(error)]
    photos = len({question.image for question in questions})
    return Source(name, len(questions), photos, partial(read_question, name, questions), problems)


def read_question(name: str, questions: list[Question], number: int) -> Record:
    question = questions[number]
    image, id = question.open_image(), f"{name}/{question.id}"
    check_texts(id, [question.prompt])
    return Record(id, image, [([question.prompt], np.zeros((0, image.height, image.width), np.uint8))])


def open_own(path: Path, allow_outside: bool) -> Source:
    """Own data with its faults, for which training would refuse it."""
    return set_source(str(path), Custom(f"custom|{path}", "", allow_outside=allow_outside, strict=False), read_own)


def tree_sources(dataset_dir: Path, data_dir: Path, allow_outside: bool) -> Iterator[tuple[str, Callable[[], Source]]]:
    """(name, function that opens it) of training sets, evaluation splits and VQA benchmarks."""
    options = {"dataset_dir": dataset_dir, "data_dir": data_dir, "allow_outside": allow_outside}
    options["num_classes_per_sample"] = ALL
    for family in FAMILIES.values():
        for name, training_set in family.items():
            yield name, partial(open_training_set, Choice(name, training_set, options))
    for name in SPLITS:
        yield name, partial(open_split, name, dataset_dir, allow_outside)
    for name, benchmark in VQA_BENCHMARKS.items():
        yield name, partial(open_benchmark, name, benchmark, data_dir)


def is_tree(path: Path) -> bool:
    """Whether a folder holds one of the folders of the sets, such as ade20k; question sets are another folder's."""
    sets = [each for family in FAMILIES.values() for each in family.items()]
    first = [training_set.paths(name, Path(), Path(os.sep))[0] for name, training_set in sets]
    return any(path.joinpath(own.parts[0]).is_dir() for own in first if not own.is_absolute())


def check(source: Source, args: argparse.Namespace, tokenizer: Any) -> None:
    """Read `limit` records of a set, evenly spread, or all, and draw `samples` of them."""
    source.checked = count = min(source.records, args.limit or source.records)
    numbers = np.linspace(0, source.records - 1, count).astype(int).tolist()
    drawn = {numbers[k] for k in np.random.default_rng(0).permutation(count)[: args.samples]}
    examine = partial(examined, source, drawn, args.model_max_length, tokenizer)
    workers = args.workers if count >= IN_WORKERS else 0
    loader = DataLoader(numbers, batch_size=None, collate_fn=examine, num_workers=workers)
    for counts, problems, pictures in tqdm(loader, source.name, unit=" records", delay=1, leave=False, disable=None):
        source.counts = [sum(pair) for pair in zip(source.counts, counts)]
        source.problems += problems
        source.pictures += pictures


def examined(
    source: Source, drawn: set[int], max_length: int, tokenizer: Any, number: int
) -> tuple[list[int], list[str], list[Image.Image]]:
    """What a record adds to the counts, problems and pictures of its source; pictures are made of those in `drawn`."""
    try:
        record = source.read(number)
    except SampleError as error:
        return [0, 0, 0], [str(error)], []
    if record is None:
        return [0, 0, 0], [], []
    masks = [mask for _, masks in record.conversations for mask in masks]
    counts = [len(record.conversations), len(masks), sum(not (mask == 1).any() for mask in masks)]
    found = dict.fromkeys([*record.problems, *problems_of_masks(record, max_length, tokenizer)])
    pictures = [picture(source.name, record, number)] if number in drawn and record.conversations else []
    return counts, [f"{record.id}: {problem}" for problem in found], pictures


def problems_of_masks(record: Record, max_length: int, tokenizer: Any) -> Iterator[str]:
    """Masks of another size than their photo, and prompts whose [SEG] the length limit would cut.

    Without a tokenizer tokens are estimated by five bytes of UTF-8 for each.
    """
    width, height = record.image.size
    for turns, masks in record.conversations:
        if not len(masks):
            continue
        if masks.shape[1:] != (height, width):
            yield f"the mask's size is {masks.shape[2]} x {masks.shape[1]}, the photo {width} x {height} pixels"
        text = " ".join(turns)
        tokens = (
            len(tokenizer(text, verbose=False).input_ids) if tokenizer else len(text.encode(errors="replace")) // 5
        )
        if tokens > max_length - IMAGE_TOKENS - TEMPLATE_TOKENS:
            yield (
                f"a prompt of about {tokens:,} tokens does not fit --model_max_length {max_length}, of which "
                f"the photo takes {IMAGE_TOKENS}: {turns[0].removeprefix(prompts.IMAGE_TAG).strip()[:60]!r} ..."
            )


def picture(name: str, record: Record, turn: int) -> Image.Image:
    """Photo, mask, question and answer of a conversation that shows something."""
    conversations = [each for each in record.conversations if (each[1] == 1).any()] or record.conversations
    turns, masks = conversations[turn % len(conversations)]
    pictures = {record.id[-60:]: record.image}
    if len(masks):
        size = masks.shape[:0:-1]  # annotations are not always at the photo's size
        pictures["mask" if (masks == 1).any() else "mask: nothing"] = overlay(record.image.resize(size), masks)
    caption = " / ".join(turns).removeprefix(f"{prompts.IMAGE_TAG}\n")
    return panel(pictures, caption if len(caption) <= 300 else f"{caption[:300]} ...", name[-30:], width=CELL)


def table(sources: list[Source]) -> str:
    header = ["set", "read", "photos", "sentences", "masks", "empty", "problems", "of the known total"]
    rows = []
    for source in sources:
        read = f"{source.checked:,}" + (f" of {source.records:,}" if source.checked < source.records else "")
        numbers = [f"{number:,}" for number in (source.photos, *source.counts, len(source.problems))]
        rows.append([source.name.replace("|", " "), read, *numbers, source.totals.removeprefix("partly: ")])
    columns = -1 if all(source.totals == "-" for source in sources) else None  # own data has no known totals
    return markdown_table(header[:columns], [row[:columns] for row in rows])


def write_parts(source: Path, share: float) -> None:
    """Divide own data by photo into files of its format beside it, `_train` and `_val`, and print their names.

    share: of the photos that go to `_val`, chosen at random, the same ones each time. Raises UserError.
    """
    paths = [source.with_name(f"{source.stem}_{part}{source.suffix}") for part in ("train", "val")]
    if there := [str(path) for path in paths if path.exists()]:
        raise UserError(f"{there[0]} exists; remove it before a new split")
    suffix = source.suffix.lower()
    if suffix == ".json":
        content = read_json(source, dict)
        photos = pd.Series([image["file_name"] for image in content["images"]])
    elif suffix == ".csv":
        rows = pd.read_csv(source, dtype=str, keep_default_na=False, skipinitialspace=True, encoding="utf-8-sig")
        photos = rows[next(name for name in rows if str(name).strip().lower() == "image")].str.strip()
    else:
        lines = pd.Series([line for line in source.read_text(encoding="utf-8-sig").split("\n") if line.strip()])
        photos = lines.map(lambda line: str(json.loads(line)["image"]).strip())
    names = np.array(sorted(set(photos)))
    count = round(share * len(names))
    if not 0 < count < len(names):
        raise UserError(f"--split {share} of {len(names)} photos leaves a part without any")
    val = photos.isin(np.random.default_rng(0).permutation(names)[:count])
    for path, part in zip(paths, (~val, val)):
        if suffix == ".json":
            images = [image for image, own in zip(content["images"], part) if own]
            ids = {image["id"] for image in images}
            annotations = [each for each in content["annotations"] if each["image_id"] in ids]
            write_json(path, content | {"images": images, "annotations": annotations}, indent=None)
        else:
            write_text(path, rows[part].to_csv(index=False) if suffix == ".csv" else "\n".join(lines[part]) + "\n")
        print(f"{path}: {photos[part].nunique():,} photos")


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    class Help(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
        pass

    parser = argparse.ArgumentParser("self1e check-data", None, __doc__, formatter_class=Help, allow_abbrev=False)
    add = parser.add_argument
    add("path", metavar="PATH", type=Path, help="the tree's dataset folder, or own data (file or folder)")
    add("--data_dir", type=Path, help="VQA sets of the tree; unset: the folder data beside PATH")
    add("--output", type=Path, default=SHEET, help="the contact sheet")
    add("--samples", type=int, help="pictures per set on it, 0 for no sheet; unset: 2, and 12 of own data")
    add("--limit", type=int, help="records read of each set at most, evenly spread; unset: all")
    add("--split", type=float, help="share of the photos of own data for a _val file; the others go to _train")
    add("--model_max_length", type=int, default=512, help="of training: the most tokens of a conversation")
    add("--version", help="model whose tokenizer counts them; unset: an estimate")
    add("--allow_outside", action="store_true", help="take files that annotations name outside their folder")
    add("--workers", type=int, default=min(16, os.cpu_count() or 1), help="processes that read")
    args = parser.parse_args(argv)
    if not args.path.exists():
        parser.error(f"{args.path} does not exist")
    if args.output.suffix.lower() not in Image.registered_extensions():
        parser.error(f"--output {args.output}: expected a picture's name, such as {args.output / 'contact_sheet.png'}")
    if min(args.samples or 0, args.workers) < 0 or (args.limit is not None and args.limit < 1):
        parser.error("--samples and --workers are at least 0, --limit is at least 1")
    args.tree = is_tree(args.path)
    if args.output.is_dir():
        parser.error(f"--output {args.output} is a folder; name a file")
    if args.split is not None and args.tree:
        parser.error("--split divides own data; the sets of the tree have their splits")
    if args.samples is None:
        args.samples = 2 if args.tree else 12
    args.data_dir = args.data_dir or args.path.resolve().parent / "data"
    return args


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_arguments(argv)
    if args.samples:
        check_writable(args.output.parent)
    own = {str(args.path): partial(open_own, args.path, args.allow_outside)}
    openers = tree_sources(args.path, args.data_dir, args.allow_outside) if args.tree else own.items()
    tokenizer = Self1EProcessor.from_pretrained(args.version).tokenizer if args.version else None
    sources, absent = [], []
    for name, load in openers:
        try:
            source = load()
        except MissingFile:
            absent.append(name)
            continue
        except UserError as error:
            source = Source(name, problems=[str(error)])
        check(source, args, tokenizer)
        sources.append(source)
        if source.problems:
            more = len(source.problems) - LISTED
            print(f"\n{name}:", *source.problems[:LISTED], *[f"and {more:,} more"] * (more > 0), sep="\n  ")
    if not any(source.checked for source in sources):
        print(f"nothing to check in {args.path}: name the folder that holds ade20k, ..., or own data", file=sys.stderr)
        return 1
    print(f"\n{table(sources)}")
    if absent:
        print(f"not there: {', '.join(absent)}")
    if pictures := [picture for source in sources for picture in source.pictures]:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        grid(pictures, 4, cell=CELL).save(args.output)
        print(f"look at {args.output}")
    problems = sum(len(source.problems) for source in sources)
    print(f"problems: {problems:,}" if problems else "no problems found")
    if args.split is not None and not problems:
        write_parts(find_source(args.path), args.split)
    return 1 if problems else 0
