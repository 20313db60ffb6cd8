"""Own data: photos, masks and sentences outside of the README's tree.

A source is one of

    train.json    COCO style: `images`, `annotations`, `categories`; an annotation's `captions` or `phrases` (a string
                  or a list) are its sentences, without them the name of its category is
    train.csv     columns `image,mask,prompt`, optionally `value`; a line is one sentence, a photo may have several
    train.jsonl   the same, each line an object with these keys
    a folder      that holds one such CSV

Files are named relative to the folder of the source, or to `images/` (photos) and `masks/` in it; they must lie in
there (see `paths.inside`). A mask is a one-channel PNG: foreground is where it is `value`, or, without one, above 0.
One sentence on several annotations of a photo means all of them: its mask is their union. What ends like a sentence is
asked as it is; all else is a phrase, lower-cased ("the red car").
"""

import csv
import json
import logging
import os
import reprlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image
from tqdm import tqdm

from self1e.data.masks import contradiction, decode_segmentation, load_label_map
from self1e.data.paths import OWN_DATA, inside, list_names
from self1e.data.readers import Tally, fields, json_lines, stream_json
from self1e.data.samples import SampleError, image_keys
from self1e.data.sets.expressions import Expression, ExpressionData, ExpressionSet, ExpressionSplit
from self1e.data.tables import Writer, open_tables
from self1e.errors import UserError
from self1e.files import check_fetched
from self1e.model.prompts import looks_like_sentence

log = logging.getLogger(__name__)
NAME = "custom"
COLUMNS = ("image", "mask", "prompt")
SENTENCES = ("captions", "phrases", "caption", "phrase")
SUFFIXES = (".json", ".csv", ".jsonl")
LISTED = 50  # problems in one error message


# --------------------------------------------------------------------------------------------------------- reading


class Target(NamedTuple):
    """One mask of a photo and the sentences that mean it.

    image: the photo's name in the file. size: [height, width] that a COCO-style JSON states
    mask:  an annotation of a COCO-style JSON, else {"file", "value"}
    location: where it stands in the file, such as "line 7"
    """

    image: str
    size: list[int] | None
    sentences: list[str]
    mask: dict[str, Any]
    location: str


def read_source(path: Path, out: Writer) -> None:
    """Table `photos`: [name, [height, width] or null, [[sentences, mask, location], ...]] of each photo that has a
    sentence, in file order; meta `faulty`, "<location>: <what>" of each record that is left out, and `problems`, what
    contradicts itself.

    Raises UserError where the file as a whole is of another form.
    """
    faulty: list[str] = []
    tally = Tally()
    photos: dict[str, tuple[list[int] | None, list[str]]] = {}
    for image, size, sentences, mask, location in (_annotations if path.suffix.lower() == ".json" else _rows)(
        path, faulty
    ):
        if size is not None:
            tally.add(contradiction(mask, *size), location)
            mask = {"segmentation": mask["segmentation"]}
        # As text, which takes a fifth of the memory.
        photos.setdefault(image, (size, []))[1].append(json.dumps([sentences, mask, location]))
    out.declare("photos")
    for name, (size, targets) in photos.items():
        out.add("photos", [name, size, [json.loads(target) for target in targets]])
    out.meta["faulty"], out.meta["problems"] = faulty, tally.lines()


@contextmanager
def _noting(faulty: list[str]) -> Iterator[None]:
    """Notes what is wrong with a record instead of raising it, so that all faults of a file are named at once."""
    try:
        yield
    except UserError as error:
        faulty.append(str(error))


def _rows(path: Path, faulty: list[str]) -> Iterator[Target]:
    """The rows of a CSV or JSONL."""
    for location, row in _csv_rows(path) if path.suffix.lower() == ".csv" else json_lines(path):
        with _noting(faulty):
            if not isinstance(row, dict) or None in row:
                raise UserError(f"{location}: not one value for each column; quote a prompt that holds a comma")
            cells = {name: "" if row.get(name) is None else str(row[name]).strip() for name in (*COLUMNS, "value")}
            empty = [f"{name} is empty" for name in COLUMNS if not cells[name]]
            if empty:
                raise UserError(f"{location}: {', '.join(empty)}")
            image, mask, prompt, value = cells.values()
            number = value.removesuffix(".0")  # tables turn whole numbers into these where cells are empty
            if number and not number.isdecimal():
                raise UserError(f"{location}: value {value!r:.80} is no whole number of a pixel")
            yield Target(image, None, [prompt], {"file": mask, "value": int(number) if number else None}, location)


def _csv_rows(path: Path) -> Iterator[tuple[str, dict]]:
    check_fetched(path)
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            rows = csv.DictReader(file, skipinitialspace=True, strict=True)
            header = [name.strip() for name in rows.fieldnames or []]
            rows.fieldnames = [name.lower() for name in header]
            absent = [name for name in COLUMNS if name not in rows.fieldnames]
            if absent:
                raise UserError(
                    f"{path}, line 1: no column {', '.join(absent)}; found {', '.join(header) or 'nothing':.200}; "
                    f"expected {','.join(COLUMNS)} and, if wanted, value, separated by commas ({OWN_DATA})"
                )
            for row in rows:
                yield f"line {rows.line_num}", row
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path} is no UTF-8 CSV ({error}); save it as one") from error


def _annotations(path: Path, faulty: list[str]) -> Iterator[Target]:
    """The annotations of a COCO-style JSON; the file is read once for each of its three lists, never held whole."""
    images: dict[int | str, tuple[str, list[int]]] = {}
    categories: dict[int | str, str] = {}
    found = 0
    for location, record in stream_json(path, "images"):
        with _noting(faulty):
            id, name, *size = fields(record, location, id=(int, str), file_name=str, height=int, width=int)
            if id in images:
                raise UserError(f"{location}: id {id!r} occurs twice")
            if min(size) < 1:
                raise UserError(f"{location}: height and width are {size[0]} and {size[1]}")
            images[id] = name, size
    for location, record in stream_json(path, "categories"):
        with _noting(faulty):
            id, name = fields(record, location, id=(int, str), name=str)
            categories[id] = name.strip()
    for location, record in stream_json(path, "annotations"):
        found += 1
        with _noting(faulty):
            image_id, segmentation = fields(record, location, image_id=(int, str), segmentation=(list, dict))
            if image_id not in images:
                raise UserError(f"{location}: image_id {image_id!r} is not among the images")
            if not segmentation and record.get("bbox") and record.get("area"):
                raise UserError(f"{location}: segmentation is empty beside a bbox and an area; a box is no outline")
            yield Target(*images[image_id], _sentences(record, categories, location), record, location)
    if not found or not images and not faulty:
        raise UserError(f"{path} has no images or no annotations; a COCO-style object was expected ({OWN_DATA})")


def _sentences(annotation: dict, categories: dict[int | str, str], location: str) -> list[str]:
    """The captions and phrases of an annotation or, where it has none, the name of its category."""
    found: list[str] = []
    for field in SENTENCES:
        value = annotation.get(field) or []
        texts = [value] if isinstance(value, str) else value
        if not isinstance(texts, list) or not all(isinstance(text, str) and text.strip() for text in texts):
            raise UserError(f"{location}: {field} is {reprlib.repr(value)}, neither a sentence nor several")
        found += [text.strip() for text in texts]
    category: Any = annotation.get("category_id")
    if not found and not categories.get(category):
        raise UserError(f"{location}: neither captions nor phrases, and category {reprlib.repr(category)} has no name")
    return found or [categories[category]]


def find_source(path: str | Path) -> Path:
    """The file that `path` is or, a folder, holds; a path that does not exist comes back as it is.

    Raises UserError when it is of another kind, or a folder that holds no CSV or several of them.
    """
    path = Path(path)
    if path.is_dir():
        found = [path / name for name in list_names(path, ".csv")]
        if len(found) != 1:
            names = ", ".join(file.name for file in found[:5]) or "none"
            raise UserError(f"{path} should hold one .csv, found {names}; name a {', '.join(SUFFIXES)} ({OWN_DATA})")
        return found[0]
    if path.exists() and path.suffix.lower() not in SUFFIXES:
        raise UserError(f"{path}: expected a {', '.join(SUFFIXES)}, or a folder with one .csv ({OWN_DATA})")
    return path


# ------------------------------------------------------------------------------------------------------------ sets


class CustomData(ExpressionData):
    """The photos of one source that have sentences, in file order; `name` is "custom|<file name>".

    A target is (number of a mask among those of its photo, its location in the file).

    faulty: "<location>: <what>" of the records that are left out; training and evaluation refuse them
    doubts: the same of masks read so far that may not be what their record means
    """

    def __init__(self, path: str | Path, *, allow_outside: bool = False):
        self.source = find_source(path)
        self.name = f"{NAME}|{self.source.name}"
        self.allow_outside = allow_outside
        tables = open_tables(self.source, read_source)
        self._photos = tables.records("photos")
        self._last: tuple[int, Any] = (-1, None)
        self.faulty: list[str] = tables.meta["faulty"]
        self.problems = [f"{self.source.name}: {problem}" for problem in tables.meta["problems"]]
        self.doubts: dict[str, str] = {}

    def __len__(self) -> int:
        return len(self._photos)

    def _record(self, item: int) -> tuple[str, list[int] | None, list]:
        """Name, [height, width] or None, and [sentences, mask, location] of each mask of a photo."""
        if self._last[0] != item:
            self._last = item, self._photos[item]
        return self._last[1]

    def check(self) -> "CustomData":
        """Raise one UserError that names every faulty record, and every photo and mask file that is not on disk."""
        faults = dict.fromkeys(self.faulty)
        met = set()
        for item in tqdm(range(len(self)), f"files of {self.source.name}", delay=2, leave=False):
            photo, _, targets = self._record(item)
            masks = [(mask["file"], "masks", f"{location}: mask") for _, mask, location in targets if "file" in mask]
            for name, below, id in [(photo, "images", f"{targets[0][2]}: image"), *masks]:
                if (name, below) not in met:
                    met.add((name, below))
                    try:
                        self._find(name, below, id)
                    except SampleError as error:
                        faults[str(error)] = None
        if faults:
            more = [f"and {len(faults) - LISTED} more"] if len(faults) > LISTED else []
            lines = "\n  ".join([*list(faults)[:LISTED], *more])
            raise UserError(f"{self.source}, problems: {len(faults)} ({OWN_DATA}):\n  {lines}")
        if not len(self):
            raise UserError(f"{self.source} holds no photo with a sentence")
        return self

    def _find(self, name: str, below: str, id: str) -> Path:
        """Where a file is: beside the source or in the folder `below`. Raises SampleError where it is not."""
        folder = self.source.parent
        try:
            for parent in folder, folder / below:
                path = inside(parent, name, allow_outside=self.allow_outside)
                if path.is_file():
                    return path
        except UserError as error:
            raise SampleError(id, str(error)) from error
        raise SampleError(id, f"{name} is neither in {folder} nor in {folder / below}")

    def image_keys(self) -> np.ndarray:
        """`image_key` of each photo: COCO's number, or one of the file's path, since own names mean little."""
        folder = os.path.realpath(self.source.parent)
        return image_keys(f"{folder}/{self.file_name(item)}" for item in range(len(self)))

    def file_name(self, item: int) -> str:
        return self._record(item)[0]

    def expressions(self, item: int) -> list[Expression]:
        """Sentences that are asked in the same words are one. Which of them mean nothing only their masks know."""
        found: dict[str, tuple[str, list]] = {}
        for number, (sentences, _, location) in enumerate(self._record(item)[2]):
            for text in sentences:
                asked = text if looks_like_sentence(text) else text.lower()
                found.setdefault(asked, (text, []))[1].append((number, location))
        return [
            Expression(text, targets, str(k), looks_like_sentence(text))
            for k, (text, targets) in enumerate(found.values())
        ]

    def photo(self, item: int, id: str) -> Path:
        return self._find(self.file_name(item), "images", f"{self._record(item)[2][0][2]}: image")

    def load(self, item: int, wanted: Sequence[list[Any]]) -> tuple[Image.Image, np.ndarray]:
        image, masks = super().load(item, wanted)
        if image.width != image.height and self._record(item)[1] == [image.width, image.height]:
            place = self._record(item)[2][0][2]
            self._doubt(place, "the size is that of the photo before EXIF turns it, so its masks are turned, too")
        return image, masks

    def _doubt(self, location: str, what: str) -> None:
        if not self.doubts:  # said once
            log.warning("%s: %s: %s", self.name, location, what)
        self.doubts[location] = what

    def where(self, target: tuple[int, str]) -> str:
        return target[1]

    def mask(self, item: int, target: tuple[int, str], id: str) -> np.ndarray:
        _, size, targets = self._record(item)
        _, mask, location = targets[target[0]]
        if size is not None:
            try:
                return decode_segmentation(mask["segmentation"], *size)
            except ValueError as error:
                raise SampleError(id, f"{location}: malformed segmentation ({error})") from error
        labels = load_label_map(self._find(mask["file"], "masks", f"{location}: mask"), id)
        if mask["value"] is None:
            return (labels > 0).astype(np.uint8)
        found = labels == mask["value"]
        if not found.any():
            self._doubt(location, f"no pixel of {mask['file']} has the value {mask['value']}")
        return found.astype(np.uint8)


class CustomSet(ExpressionSet):
    """Training photos of one source; a conversation is one sentence. `name` holds no folder, which may change."""

    name = NAME

    def __init__(
        self,
        dataset_dir: Path,
        data_dir: Path,
        *,
        conversations: int,
        allow_outside: bool = False,
        source: str | Path,
    ):
        super().__init__(CustomData(source, allow_outside=allow_outside).check(), conversations=conversations)
        self.name = self.data.name

    @classmethod
    def paths(cls, dataset_dir: Path, data_dir: Path, source: str | Path = "") -> list[Path]:
        return [find_source(source)]


class CustomSplit(ExpressionSplit):
    """One source for evaluation; `name` is "custom|<path>", a unit is one sentence."""

    def __init__(self, name: str, dataset_dir: Path, *, allow_outside: bool = False):
        super().__init__(name, CustomData(name.removeprefix(f"{NAME}|"), allow_outside=allow_outside).check())

    @staticmethod
    def paths(name: str, dataset_dir: Path) -> list[Path]:
        return [find_source(name.removeprefix(f"{NAME}|"))]
