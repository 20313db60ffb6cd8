"""Readers of own data: a COCO-style JSON with sentences, or a CSV of prompts, into one index.

A faulty record is left out and its problem is kept with its place ("line 7", "annotations[12]"), so that all problems
of a file can be named at once.
"""

import csv
import io
import reprlib
from array import array
from collections import Counter
from collections.abc import Container
from pathlib import Path
from typing import Any

import numpy as np

from self1e.data.readers import stream_json, take
from self1e.data.tables import Writer

HELP = "docs/data.md, section Own data"
COLUMNS = ("image", "mask", "prompt")


class _Tables:
    """What both readers write: photos, their targets, and the problems of records that are left out.

    Tables `photos` [file name, [height, width] or null, place] and `targets` [[sentence, ...] or category id,
    segmentation or [mask file, value or null], place], in file order; `order` are the targets sorted by photo,
    `starts` (photos + 1,) each photo's first place in it; meta `categories` [[id, name], ...], `problems`
    ["<place>: <what>", ...].
    """

    def __init__(self, out: Writer):
        self.out, self.photos = out, 0
        self.owners: array[int] = array("q")
        self.problems: list[str] = []
        self.categories: dict[int | str, str] = {}
        out.declare("photos", "targets")

    def photo(self, name: str, size: list[int] | None, place: str) -> int:
        """Add one; returns its number."""
        self.out.add("photos", [name, size, place])
        self.photos += 1
        return self.photos - 1

    def target(self, owner: int, sentences: list[str] | int | str, mask: Any, place: str) -> None:
        """Add one of photo number `owner`; -1 leaves it out."""
        self.out.add("targets", [sentences, mask, place])
        self.owners.append(owner)

    def close(self) -> None:
        owners = np.frombuffer(self.owners, np.int64)
        order = np.argsort(owners, kind="stable")
        self.out.array("order", order)
        self.out.array("starts", np.searchsorted(owners[order], np.arange(self.photos + 1)))
        self.out.meta["categories"] = list(self.categories.items())
        self.out.meta["problems"] = self.problems


def _require(record: Any, fields: dict[str, tuple[type, ...]]) -> None:
    """Raise ValueError naming the fields of a JSON record that are absent or of another type."""
    if not isinstance(record, dict):
        raise ValueError(f"{reprlib.repr(record)} is no object")
    faults = []
    for name, kinds in fields.items():
        try:
            take(record, name, *kinds)
        except KeyError:
            faults.append(f"it has no {name}")
        except TypeError:
            faults.append(f"{name} is {reprlib.repr(record[name])}")
    if faults:
        raise ValueError(", ".join(faults))


def _once(value: Any, seen: Container, what: str) -> None:
    if value in seen:
        raise ValueError(f"{what} {value!r} occurs twice")


def _sentences(annotation: dict) -> list[str]:
    """The captions and phrases of an annotation, stripped. Raises ValueError for what is neither."""
    found = []
    for field in ("captions", "phrases"):
        value = annotation.get(field) or []
        value = [value] if isinstance(value, str) else value
        if not isinstance(value, list) or not all(isinstance(text, str) for text in value):
            raise ValueError(f"{field} is {reprlib.repr(value)}, neither a string nor a list of strings")
        if not all(text.strip() for text in value):
            raise ValueError(f"{field} holds an empty sentence")
        found += [text.strip() for text in value]
    return found


class _CocoTables(_Tables):
    """Takes the records of a COCO-style file in any order; each method raises ValueError for a faulty one."""

    def __init__(self, out: Writer):
        super().__init__(out)
        self.numbers: dict[int | str, int] = {}
        self.names: set[str] = set()
        self.annotation_ids: set[int | str] = set()
        # Of each target: (place, image id, category id if it has no sentence of its own).
        self.pending: list[tuple[str, int | str, int | str | None]] = []

    def take_image(self, record: Any, place: str) -> None:
        _require(record, {"id": (int, str), "file_name": (str,), "height": (int,), "width": (int,)})
        size = [record["height"], record["width"]]
        _once(record["id"], self.numbers, "id")
        _once(record["file_name"], self.names, "file_name")
        if min(size) < 1:
            raise ValueError(f"height and width are {size}")
        self.numbers[record["id"]] = self.photo(record["file_name"], size, place)
        self.names.add(record["file_name"])

    def take_category(self, record: Any, place: str) -> None:
        _require(record, {"id": (int, str), "name": (str,)})
        _once(record["id"], self.categories, "id")
        self.categories[record["id"]] = record["name"].strip()

    def take_annotation(self, record: Any, place: str) -> None:
        _require(record, {"id": (int, str), "image_id": (int, str), "segmentation": (list, dict)})
        _once(record["id"], self.annotation_ids, "id")
        self.annotation_ids.add(record["id"])
        sentences, category = _sentences(record), None
        if not sentences:
            category = record.get("category_id")
            if not isinstance(category, (int, str)):
                raise ValueError("it has neither captions nor phrases nor a category_id")
        self.target(-1, sentences or category or 0, record["segmentation"], place)
        self.pending.append((place, record["image_id"], category))

    def close(self) -> None:
        """Find the image and the category of each target, now that all of them are known."""
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
    tables = _CocoTables(out)
    counts: Counter[str] = Counter()
    takes = {"images": tables.take_image, "annotations": tables.take_annotation, "categories": tables.take_category}
    for key, take_record in takes.items():
        for record in stream_json(path, f"{key}.item"):
            place = f"{key}[{counts[key]}]"
            counts[key] += 1
            try:
                take_record(record, place)
            except ValueError as error:
                tables.problems.append(f"{place}: {error}")
    absent = [key for key in ("images", "annotations") if not counts[key]]
    if absent:
        raise ValueError(f"{path} has no {' and no '.join(absent)}; a COCO-style object was expected ({HELP})")
    tables.close()


def read_prompt_table(path: Path, out: Writer) -> None:
    """CSV of prompts, UTF-8, with a header line."""
    tables = _Tables(out)
    photos: dict[str, int] = {}
    try:
        with open(path, "rb") as file:
            rows = csv.DictReader(io.TextIOWrapper(file, encoding="utf-8-sig", newline=""), strict=True)
            header = list(rows.fieldnames or [])
            absent = [name for name in COLUMNS if name not in header]
            if absent:
                raise ValueError(
                    f"{path}, line 1: no column {', '.join(absent)}; found {', '.join(header) or 'nothing':.200}; "
                    f"expected {','.join(COLUMNS)} and, if wanted, value, separated by commas ({HELP})"
                )
            for row in rows:
                place = f"line {rows.line_num}"
                faults = [f"{name} is empty" for name in COLUMNS if not (row[name] or "").strip()]
                if None in row:
                    faults.append(f"more cells than the header's {len(header)}; quote a prompt that holds a comma")
                value = (row.get("value") or "").strip()
                if value and not (value.isdecimal() and len(value) < 10):
                    faults.append(f"value {value!r:.80} is no whole number of a pixel")
                tables.problems += [f"{place}: {fault}" for fault in faults]
                if not faults:
                    image, mask, prompt = (row[name].strip() for name in COLUMNS)
                    if image not in photos:
                        photos[image] = tables.photo(image, None, place)
                    tables.target(photos[image], [prompt], [mask, int(value) if value else None], place)
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path} is no UTF-8 CSV ({error}); save it as one") from error
    tables.close()


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
