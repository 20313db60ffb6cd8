"""Own data: photos, masks and sentences outside of the README's tree; docs/data.md shows the files.

A source is a COCO-style JSON, whose annotations carry `captions` or `phrases` (without them the name of the category
is asked for), a CSV or JSONL with `image,mask,prompt` and perhaps `value`, or a folder that holds one CSV.
"""

import csv
import logging
import reprlib
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image
from tqdm import tqdm

from self1e.data.masks import contradiction, decode_segmentation, load_label_map
from self1e.data.readers import Records, counted, fields, json_lines, open_tables, stream_json
from self1e.data.samples import OWN_DATA, image_key, inside, list_names, naming
from self1e.data.sets.expressions import Expression, ExpressionSet
from self1e.errors import UserError, check_known
from self1e.model.prompts import looks_like_sentence, visible

log = logging.getLogger(__name__)
COLUMNS = ("image", "mask", "prompt")
SENTENCES = ("captions", "phrases", "caption", "phrase")
SUFFIXES = (".json", ".csv", ".jsonl")
LISTED = 50  # faults in one error message


class Target(NamedTuple):
    """A mask of a source, and what it says about it."""

    photo: str
    size: list[int] | None  # [height, width] of the segmentation; None where the mask is a file
    sentences: list[str]
    mask: Any  # COCO segmentation, or {file, value}
    problem: str | None  # how it contradicts what is written beside it
    location: str


def read_source(path: Path) -> Records:
    """Tables of a source.

    targets: [sentences, mask, location] of each `Target`. photos: [name, size, numbers of its targets] in file order.
    files: [name, folder that it may be in, location where it is met first].
    faults: "<location>: <what>" of each record that is left out. problems: what contradicts itself.
    """
    faults: list[str] = []

    def sound(records: Iterable[tuple[str, Any]], read: Callable[[Any, str], Any]) -> Iterator[Any]:
        """What `read` makes of each record; the faults of others are noted, to be named at once."""
        for location, record in records:
            try:
                yield read(record, location)
            except UserError as error:
                faults.append(str(error))

    if path.suffix.lower() == ".json":
        images: dict[int | str, list] = {}
        image = partial(fields, id=(int, str), file_name=str, height=int, width=int)
        for id, *own in sound(stream_json(path, "images"), image):
            if images.setdefault(id, own) is not own:
                faults.append(f"images: id {id!r} occurs twice")
        categories = dict(sound(stream_json(path, "categories"), partial(fields, id=(int, str), name=str)))
        targets = sound(stream_json(path, "annotations"), partial(_annotation, images, categories))
    else:
        targets = sound(table_rows(path), _row)
    photos: dict[str, list] = {}
    files: dict[tuple[str, str], str] = {}
    problems: dict[str, list] = defaultdict(list)
    for number, target in enumerate(targets):
        yield "targets", [target.sentences, target.mask, target.location]
        photos.setdefault(target.photo, [target.photo, target.size, []])[2].append(number)
        files.setdefault((target.photo, "images"), target.location)
        if target.size is None:
            files.setdefault((target.mask["file"], "masks"), target.location)
        if target.problem:
            problems[target.problem].append(target.location)
    yield from (("photos", photo) for photo in photos.values())
    yield from (("files", [*file, location]) for file, location in files.items())
    yield from (("faults", fault) for fault in faults)
    yield from counted(path, problems)


def _annotation(images: dict[int | str, list], categories: dict[int | str, str], record: Any, location: str) -> Target:
    """An annotation of a COCO-style file. Raises UserError."""
    image_id, segmentation = fields(record, location, image_id=(int, str), segmentation=(list, dict))
    if image_id not in images:
        raise UserError(f"{location}: image_id {image_id!r} is not among the images")
    if not segmentation and record.get("bbox") and record.get("area"):
        raise UserError(f"{location}: segmentation is empty beside a bbox and an area; a box is no outline")
    given = [record.get(field) or [] for field in SENTENCES]
    sentences = [text for value in given for text in (value if isinstance(value, list) else [value])]
    category = record.get("category_id")
    sentences = sentences or [categories.get(category, "") if isinstance(category, int | str) else ""]
    if not all(isinstance(text, str) and visible(text) for text in sentences):
        cause = "a sentence is empty or no text, or there is none and its category has no name"
        raise UserError(f"{location}: {cause}: {reprlib.repr(sentences)}")
    name, *size = images[image_id]
    problem = contradiction(record, *size)
    return Target(name, size, [text.strip() for text in sentences], segmentation, problem, location)


def _row(row: Any, location: str) -> Target:
    """A line of `table_rows`. Raises UserError."""
    name, mask, prompt, value = texts_of(location, row, COLUMNS, "value")
    number = value.removesuffix(".0")  # tables turn whole numbers into these where cells are empty
    if number and not number.isdecimal():
        raise UserError(f"{location}: value {value!r:.80} is no whole number of a pixel")
    return Target(name, None, [prompt], {"file": mask, "value": int(number) if number else None}, None, location)


def table_rows(path: Path, needed: Iterable[str] = COLUMNS) -> Iterator[tuple[str, dict]]:
    """(location, {column: value}) of each line of a CSV or JSONL. Raises UserError when it is no such file."""
    if path.suffix.lower() != ".csv":
        for location, row in json_lines(path):
            yield location, {name.strip().lower(): row[name] for name in row} if isinstance(row, dict) else row
        return
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            rows = csv.DictReader(file, skipinitialspace=True, strict=True)
            rows.fieldnames = [name.strip().lower() for name in rows.fieldnames or []]
            check_known(f"line 1 should be {','.join(needed)} and holds no", needed, rows.fieldnames)
            for row in rows:
                yield f"line {rows.line_num}", row
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"no UTF-8 CSV ({error}); save it as one") from error


def texts_of(location: str, row: dict, needed: Iterable[str], other: str) -> list[str]:
    """The values of columns in a line of `table_rows`; that of `other` may be "". Raises UserError."""
    columns, whole = (*needed, other), isinstance(row, dict) and None not in row
    if not whole or any(isinstance(row.get(name), list | dict) for name in columns):
        raise UserError(f"{location}: not one value for each column; quote a prompt that holds a comma")
    cells = ["" if value is None else str(value).strip() for value in map(row.get, columns)]
    if empty := [f"{name} is empty" for name, cell in zip(needed, cells) if not visible(cell)]:
        raise UserError(f"{location}: {', '.join(empty)}")
    return cells


def find_source(path: str | Path) -> Path:
    """The file that `path` is or, a folder, holds; one that does not exist comes back as it is. Raises UserError."""
    path = Path(path)
    if path.is_dir() and len(found := list_names(path, ".csv")) == 1:
        return path / found[0]
    if path.is_dir() or (path.exists() and path.suffix.lower() not in SUFFIXES):
        raise UserError(f"{path}: expected a {', '.join(SUFFIXES)}, or a folder with one .csv ({OWN_DATA})")
    return path


class Custom(ExpressionSet):
    """The photos of one source, "custom|<path>", that have sentences, in file order; `name` holds no folder.

    A target is the number of a mask in the file. Which expressions mean nothing only their masks know.

    strict: refuse a source with faulty records or missing files; otherwise `problems` lists the records left out. It
            grows by records that were read and may not mean what they say.
    """

    problems: list[str]

    def paths(self) -> list[Path]:
        return [find_source(self.name.partition("|")[2])]

    def open(self, source: Path) -> None:
        self.source, self.name = source, f"custom|{source.name}"
        tables = open_tables(source, read_source)
        self._photos, self._targets, faults = tables["photos"], tables["targets"], list(tables["faults"])
        self.problems = [*faults, *tables["problems"]]
        if not self.flags.get("strict", True):
            return
        for name, below, location in tqdm(tables["files"], f"files of {source.name}", leave=False, disable=None):
            try:
                self._find(name, below)
            except UserError as error:
                faults.append(f"{location}: {error}")
        if not len(self):
            faults.append("no photo has a sentence and a mask")
        if faults:
            listed = faults[:LISTED] + [f"and {len(faults) - LISTED} more"] * (len(faults) > LISTED)
            raise UserError("\n  ".join([f"{source}, problems: {len(faults)} ({OWN_DATA}):", *listed]))

    def _find(self, name: str, below: str) -> Path:
        """A file beside the source or in the folder `below`. Raises UserError where it is in neither."""
        folder = self.source.parent
        for parent in folder, folder / below:
            if (path := inside(parent, name, allow_outside=self.allow_outside)).is_file():
                return path
        raise UserError(f"{name} is neither in {folder} nor in {folder / below}")

    def __len__(self) -> int:
        return len(self._photos)

    def image_keys(self) -> np.ndarray:
        """COCO's number, or a key of the file's path, since own names mean little."""
        folder = self.source.parent.resolve()
        return np.array([image_key(f"{folder}/{name}") for name, *_ in self._photos], np.int64)

    def file_name(self, index: int) -> str:
        return self._photos[index][0]

    def photo(self, index: int) -> Path:
        name, _, numbers = self._photos[index]
        with naming(self.where(numbers[0])):
            return self._find(name, "images")

    def expressions(self, index: int) -> list[Expression]:
        """Sentences that are asked in the same words are one."""
        found: dict[str, Expression] = {}
        for number in self._photos[index][2]:
            for text in self._targets[number][0]:
                is_sentence = looks_like_sentence(text)
                asked = text if is_sentence else text.lower()
                new = Expression(text, [], f"/{len(found)}", is_sentence)
                found.setdefault(asked, new).targets.append(number)
        return list(found.values())

    def where(self, target: int) -> str:
        return self._targets[target][2]

    def mask(self, index: int, target: int, image: Image.Image) -> np.ndarray:
        size, mask = self._photos[index][1], self._targets[target][1]
        if size is not None:
            if size == [image.width, image.height] != [image.height, image.width]:
                self._doubt(target, "the size is the photo's before EXIF turns it; its masks are turned, too")
            return decode_segmentation(mask, *size)
        value, labels = mask["value"], load_label_map(self._find(mask["file"], "masks"))
        if value is None:
            return (labels > 0).astype(np.uint8)
        if value not in labels:
            self._doubt(target, "no pixel", f" of {mask['file']} has the value {value}")
        return (labels == value).astype(np.uint8)

    def _doubt(self, target: int, kind: str, more: str = "") -> None:
        problem = f"{self.where(target)}: {kind}{more}"
        if not any(kind in known for known in self.problems):  # each kind is said once
            log.warning("%s: %s", self.name, problem)
        if problem not in self.problems:
            self.problems.append(problem)
