"""Own data: photos, masks and sentences without a place in the README's tree.

A source is one of

    train.json    COCO style: `images`, `annotations`, `categories`; an annotation's `captions` or `phrases` (a string
                  or a list) are its sentences, without them the name of its category is
    train.csv     columns `image,mask,prompt`, optionally `value`; a row is one sentence, a photo may have several
    a folder      that holds one such CSV

Files are named relative to the folder of the JSON or CSV, or to `images/` (photos) and `masks/` in it. A mask is a
one-channel PNG: foreground is where it is `value`, or, without one, above 0. One sentence on several annotations of a
photo means all of them: its mask is their union. What ends like a sentence is asked as it is; all else is a phrase,
lower-cased ("the red car").
"""

import csv
from array import array
from collections import Counter
from collections.abc import Container
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from self1e.data.index import Writer, open_index, stream_json
from self1e.data.masks import decode_segmentation, load_label_map, orient
from self1e.data.sample import EvalImage, EvalSplit, Sample, SampleError, TrainingSet, image_keys, load_oriented
from self1e.model import prompts

NAME = "custom"
HELP = "docs/data.md, section Own data"
SHOWN = 50  # problems in one error message
COLUMNS = ("image", "mask", "prompt")
IMAGE_FIELDS = {"id": (int, str), "file_name": str, "height": int, "width": int}
ANNOTATION_FIELDS = {"id": (int, str), "image_id": (int, str), "segmentation": (list, dict)}
CATEGORY_FIELDS = {"id": (int, str), "name": str}


# ---------------------------------------------------------------------------------------------- readers
class _Tables:
    """What both readers write: photos, their targets, and the problems of records that are left out.

    Tables `photos` [file name, [height, width] or null, place] and `targets` [[sentence, ...] or category id,
    segmentation or [mask file, value or null], place], in file order; `order` are the targets sorted by photo,
    `starts` (photos + 1,) each photo's first place in it; meta `categories` [[id, name], ...] and `problems`
    ["<place>: <what>", ...]. A place says where to look: "line 7", "annotations[12]".
    """

    def __init__(self, out: Writer):
        self.out, self.owners, self.photos, self.problems, self.categories = out, array("q"), 0, [], {}
        out.declare("photos", "targets")

    def photo(self, name: str, size: list[int] | None, place: str) -> int:
        """Adds one; returns its number."""
        self.out.add("photos", [name, size, place])
        self.photos += 1
        return self.photos - 1

    def target(self, owner: int, sentences: list[str] | int | str, mask: Any, place: str) -> None:
        """Adds one of photo number `owner`; -1 leaves it out."""
        self.out.add("targets", [sentences, mask, place])
        self.owners.append(owner)

    def close(self) -> None:
        owners = np.frombuffer(self.owners, np.int64)
        order = np.argsort(owners, kind="stable")
        self.out.array("order", order)
        self.out.array("starts", np.searchsorted(owners[order], np.arange(self.photos + 1)))
        self.out.meta["categories"] = list(self.categories.items())
        self.out.meta["problems"] = self.problems


def _require(record: Any, fields: dict[str, Any]) -> None:
    """Raises ValueError naming the fields of a JSON record that are absent or of another type."""
    if not isinstance(record, dict):
        raise ValueError(f"{record!r} is no object")
    faults = [
        f"{name} is {record[name]!r}" if name in record else f"it has no {name}"
        for name, kinds in fields.items()
        if not isinstance(record.get(name), kinds)
    ]
    if faults:
        raise ValueError(", ".join(faults))


def _once(value: Any, seen: Container, what: str) -> None:
    if value in seen:
        raise ValueError(f"{what} {value!r} occurs twice")


def _sentences(annotation: dict) -> list[str]:
    """Its captions and phrases, stripped. Raises ValueError."""
    found = []
    for field in ("captions", "phrases"):
        value = annotation.get(field) or []
        value = [value] if isinstance(value, str) else value
        if not isinstance(value, list) or not all(isinstance(text, str) for text in value):
            raise ValueError(f"{field} is {value!r}, neither a string nor a list of strings")
        if not all(text.strip() for text in value):
            raise ValueError(f"{field} holds an empty sentence")
        found += [text.strip() for text in value]
    return found


class _CocoTables(_Tables):
    """Takes the records of a COCO-style file in any order; each method raises ValueError for a faulty one."""

    def __init__(self, out: Writer):
        super().__init__(out)
        self.numbers, self.names, self.annotation_ids = {}, set(), set()
        self.pending = []  # of each target: (place, image id, category id if it has no sentence of its own)

    def take_image(self, record: Any, place: str) -> None:
        _require(record, IMAGE_FIELDS)
        size = [record["height"], record["width"]]
        _once(record["id"], self.numbers, "id")
        _once(record["file_name"], self.names, "file_name")
        if min(size) < 1:
            raise ValueError(f"height and width are {size}")
        self.numbers[record["id"]] = self.photo(record["file_name"], size, place)
        self.names.add(record["file_name"])

    def take_category(self, record: Any, place: str) -> None:
        _require(record, CATEGORY_FIELDS)
        _once(record["id"], self.categories, "id")
        self.categories[record["id"]] = record["name"].strip()

    def take_annotation(self, record: Any, place: str) -> None:
        _require(record, ANNOTATION_FIELDS)
        _once(record["id"], self.annotation_ids, "id")
        self.annotation_ids.add(record["id"])
        sentences, category = _sentences(record), None
        if not sentences:
            if not isinstance(record.get("category_id"), (int, str)):
                raise ValueError("it has neither captions nor phrases nor a category_id")
            category = record["category_id"]
        self.pending.append((place, record["image_id"], category))
        self.target(-1, sentences or category, record["segmentation"], place)

    def close(self) -> None:
        """Finds the image and the category of each target, now that all of them are known."""
        for number, (place, image_id, category) in enumerate(self.pending):
            if image_id not in self.numbers:
                self.problems.append(f"{place}: image_id {image_id!r} is not among the images")
            elif category is not None and not self.categories.get(category):
                self.problems.append(f"{place}: neither captions nor phrases, and category {category!r} has no name")
            else:
                self.owners[number] = self.numbers[image_id]
        super().close()


def read_coco_sentences(path: Path, out: Writer) -> None:
    """COCO-style JSON with sentences."""
    tables, counts = _CocoTables(out), Counter()
    takes = {"images": tables.take_image, "annotations": tables.take_annotation, "categories": tables.take_category}
    for key, record, _ in stream_json(path):
        place = f"{key}[{counts[key]}]"
        if key in takes and record != []:
            counts[key] += 1
            try:
                takes[key](record, place)
            except ValueError as error:
                tables.problems.append(f"{place}: {error}")
    absent = [key for key in ("images", "annotations") if not counts[key]]
    if absent:
        raise ValueError(f"{path} has no {' and no '.join(absent)}; a COCO-style object was expected ({HELP})")
    tables.close()


def read_prompt_table(path: Path, out: Writer) -> None:
    """CSV of prompts, UTF-8, with a header line."""
    tables, photos = _Tables(out), {}
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            rows = csv.DictReader(file, strict=True)
            header = rows.fieldnames or []
            absent = [name for name in COLUMNS if name not in header]
            if absent:
                raise ValueError(
                    f"{path}, line 1: no column {', '.join(absent)}; found {', '.join(header) or 'nothing'}; expected "
                    f"{','.join(COLUMNS)} and, if wanted, value, separated by commas ({HELP})"
                )
            for row in rows:
                place = f"line {rows.line_num}"
                faults = [f"{name} is empty" for name in COLUMNS if not (row[name] or "").strip()]
                if None in row:
                    faults.append(f"more cells than the header's {len(header)}; quote a prompt that holds a comma")
                value = (row.get("value") or "").strip()
                if value and not value.isdecimal():
                    faults.append(f"value {value!r} is no whole number")
                tables.problems += [f"{place}: {fault}" for fault in faults]
                if not faults:
                    image, mask, prompt = (row[name].strip() for name in COLUMNS)
                    if image not in photos:
                        photos[image] = tables.photo(image, None, place)
                    tables.target(photos[image], [prompt], [mask, int(value) if value else None], place)
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path} is no UTF-8 CSV ({error}); save it as one") from error
    tables.close()


# ---------------------------------------------------------------------------------------------- data
READERS = {".json": read_coco_sentences, ".csv": read_prompt_table}


def find_source(path: str | Path) -> Path:
    """The JSON or CSV that `path` is or, a folder, holds; a path that does not exist comes back as it is.

    Raises ValueError when it is neither, or a folder that holds no CSV or several of them.
    """
    path = Path(path)
    if path.is_dir():
        found = sorted(path.glob("*.csv"))
        if len(found) != 1:
            names = ", ".join(file.name for file in found[:5]) or "none"
            raise ValueError(f"{path} should hold one .csv, found {names}; name a .csv or a COCO-style .json ({HELP})")
        return found[0]
    if path.exists() and path.suffix.lower() not in READERS:
        raise ValueError(f"{path}: expected a .json (COCO style), a .csv, or a folder with one .csv ({HELP})")
    return path


class CustomData:
    """The photos of one source that have sentences, in file order; `name` is "custom|<path>".

    Faulty records are left out; `check` refuses them.
    """

    def __init__(self, path: str | Path):
        self.name = f"{NAME}|{path}"
        self.source = find_source(path)
        self._index = open_index(self.source, READERS[self.source.suffix.lower()])
        self._photos, self._targets = self._index.table("photos"), self._index.table("targets")
        self._categories = dict(map(tuple, self._index.meta["categories"]))
        self._rows = np.flatnonzero(np.diff(self._index.array("starts")))

    def __len__(self) -> int:
        return len(self._rows)

    def problems(self) -> list[str]:
        """ "<place>: <what>" of every faulty record, and of every photo and mask file that is not on disk."""
        wanted = {}  # (file, folder) -> where it is named first
        for item in range(len(self)):
            name, _, place = self._photo(item)
            wanted.setdefault((name, "images"), f"{place}: image")
            if self.source.suffix.lower() == ".csv":
                for number in self._numbers(item):
                    _, (mask, _), place = self._targets[number]
                    wanted.setdefault((mask, "masks"), f"{place}: mask")
        folder = self.source.parent
        return self._index.meta["problems"] + [
            f"{what} {name} is neither in {folder} nor in {folder / below}"
            for (name, below), what in wanted.items()
            if not self._find(name, below).is_file()
        ]

    def check(self) -> None:
        """Raises one ValueError that names every problem."""
        problems = self.problems()
        if problems:
            more = [f"and {len(problems) - SHOWN} more"] if len(problems) > SHOWN else []
            lines = "\n  ".join(problems[:SHOWN] + more)
            raise ValueError(f"{self.source}, {len(problems)} problems ({HELP}):\n  {lines}")

    def keys(self) -> np.ndarray:
        """`image_key` of each photo: COCO's number, or one of the file's place, since own names mean little."""
        names = (self._photo(item)[0] for item in range(len(self)))
        return image_keys(str(self._find(name, "images").resolve()) for name in names)

    def _photo(self, item: int) -> tuple[str, list[int] | None, str]:
        return self._photos[int(self._rows[item])]

    def _numbers(self, item: int) -> list[int]:
        """Numbers of a photo's targets."""
        start, stop = self._index.array("starts")[self._rows[item] : self._rows[item] + 2]
        return self._index.array("order")[start:stop].tolist()

    def _find(self, name: str, below: str) -> Path:
        path = self.source.parent / name
        return path if path.exists() else self.source.parent / below / name

    def file_name(self, item: int) -> str:
        """Of the photo, as in the source."""
        return self._photo(item)[0]

    def size(self, item: int) -> list[int] | None:
        """[height, width] as COCO-style files state it."""
        return self._photo(item)[1]

    def expressions(self, item: int) -> list[tuple[str, list[int]]]:
        """(sentence, numbers of its targets) of a photo; sentences that are asked alike are one."""
        found = {}
        for number in self._numbers(item):
            sentences, _, _ = self._targets[number]
            for text in sentences if isinstance(sentences, list) else [self._categories[sentences]]:
                asked = text if prompts.looks_like_sentence(text) else text.lower()
                found.setdefault(asked, (text, []))[1].append(number)
        return list(found.values())

    def segmentation(self, number: int) -> tuple[Any, str]:
        """A target's segmentation, or [mask file, value], as in the source, and its place there."""
        return tuple(self._targets[number][1:])

    def load(self, item: int, wanted: list[list[int]]) -> tuple[Image.Image, np.ndarray]:
        """Photo, and for each list of target numbers the union of their masks (n, H, W). Raises SampleError."""
        name, size, _ = self._photo(item)
        id = f"{self.name}/{name}"
        image, orientation = load_oriented(self._find(name, "images"), id)
        decoded = {}
        for number in sorted({number for numbers in wanted for number in numbers}):
            mask = orient(self._mask(number, size, id), image, orientation)
            if mask.shape != (image.height, image.width):
                place = self.segmentation(number)[1]
                sizes = f"{mask.shape[1]} x {mask.shape[0]}, the photo {image.width} x {image.height}"
                raise SampleError(id, f"{place}: the mask's size is {sizes} pixels")
            decoded[number] = mask
        masks = [np.bitwise_or.reduce([decoded[number] for number in numbers]) for numbers in wanted]
        return image, np.stack(masks)

    def _mask(self, number: int, size: list[int] | None, id: str) -> np.ndarray:
        """uint8 {0, 1} (H, W) of one target, in the stored frame."""
        segmentation, place = self.segmentation(number)
        if size is None:
            file, value = segmentation
            labels = load_label_map(self._find(file, "masks"), id)
            return (labels > 0 if value is None else labels == value).astype(np.uint8)
        try:
            return decode_segmentation(segmentation, *size)
        except ValueError as error:
            raise SampleError(id, f"{place}: malformed segmentation ({error})") from error


class CustomSet(TrainingSet):
    """Training photos of one source; a row is one sentence."""

    name = NAME

    def __init__(self, dataset_dir: Path, data_dir: Path, *, rows: int, seed: int, source: str):
        self.data = CustomData(source)
        self.data.check()
        self.name = self.data.name
        self.rows = rows
        self.choose(len(self.data), seed)

    @classmethod
    def paths(cls, dataset_dir: Path, data_dir: Path, source: str) -> list[Path]:
        return [find_source(source)]

    def keys(self) -> np.ndarray:
        return self.data.keys()

    def read(self, item: int, rng: np.random.Generator) -> Sample:
        expressions = self.data.expressions(item)
        drawn = rng.choice(len(expressions), min(self.rows, len(expressions)), replace=False)
        chosen = [expressions[i] for i in drawn]
        conversations = [[_question(text, rng), prompts.answer(rng)] for text, _ in chosen]
        image, masks = self.data.load(item, [numbers for _, numbers in chosen])
        return Sample(f"{self.name}/{self.data.file_name(item)}", image, conversations, list(masks[:, None]))


def _question(text: str, rng: np.random.Generator) -> str:
    if prompts.looks_like_sentence(text):
        return prompts.long_question(text, rng)
    return prompts.short_question(text.lower(), rng)


class CustomSplit(EvalSplit):
    """One source for evaluation, a sequence of `EvalImage`; `name` is "custom|<path>", a unit is one sentence."""

    def __init__(self, name: str, dataset_dir: Path):
        self.name = name
        self.data = CustomData(_path(name))
        self.data.check()
        if not len(self.data):
            raise ValueError(f"{self.data.source} holds no sentence to evaluate")

    @staticmethod
    def paths(name: str, dataset_dir: Path) -> list[Path]:
        """What must exist to evaluate it."""
        return [find_source(_path(name))]

    def __len__(self) -> int:
        return len(self.data)

    def keys(self) -> np.ndarray:
        """`image_key` of each photo."""
        return self.data.keys()

    def __getitem__(self, item: int) -> EvalImage:
        if not 0 <= item < len(self):
            raise IndexError(item)
        return evaluation_image(self.data, item)


def evaluation_image(data: CustomData, item: int) -> EvalImage:
    """A photo with all its sentences. Which of them mean nothing is known only to their masks."""
    expressions, file_name = data.expressions(item), data.file_name(item)
    return EvalImage(
        image_id=file_name,
        sentences=[text for text, _ in expressions],
        is_sentence=[prompts.looks_like_sentence(text) for text, _ in expressions],
        unit_ids=[f"{file_name}/{k}" for k in range(len(expressions))],
        no_target=[False] * len(expressions),
        lower=True,
        load=partial(data.load, item, [numbers for _, numbers in expressions]),
    )


def _path(name: str) -> str:
    return name.removeprefix(f"{NAME}|")
