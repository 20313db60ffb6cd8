"""Readers of own data: COCO-style JSON, CSV or JSONL into one table of photos with their sentences and masks.

A faulty record is left out, and what is wrong with it is noted with its place ("line 7", "annotations[12]"), so that
all faults of a file can be named at once.
"""

import csv
import io
import json
import reprlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import numpy as np

from self1e.data.masks import contradiction
from self1e.data.readers import Tally, check_fetched, stream_json
from self1e.data.tables import Writer
from self1e.errors import UserError
from self1e.files import write_json, write_text

HELP = "docs/data.md, section Own data"
COLUMNS = ("image", "mask", "prompt")
SENTENCES = ("captions", "phrases", "caption", "phrase")


class Target(NamedTuple):
    """One mask of a photo and the sentences that mean it.

    image: the photo's name in the file. size: [height, width] that a COCO-style JSON states
    mask:  {"segmentation"} of a COCO-style JSON, else {"file", "value"}
    place: where it stands in the file, such as "line 7"
    """

    image: str
    size: list[int] | None
    sentences: list[str]
    mask: dict[str, Any]
    place: str


def read_source(path: Path, out: Writer) -> None:
    """Table `photos`: [name, [height, width] or null, [[sentences, mask, place], ...]] of each photo that has a
    sentence, in file order; meta `faulty`, "<place>: <what>" of each record that is left out, and `problems`, what
    contradicts itself.

    Raises UserError where the file as a whole is of another form.
    """
    faulty: list[str] = []
    tally = Tally()
    photos: dict[str, tuple[list[int] | None, list[str]]] = {}
    for target in READERS[path.suffix.lower()](path, faulty):
        if target.size is not None:
            tally.add(contradiction(target.mask, *target.size), target.place)
            target = target._replace(mask={"segmentation": target.mask["segmentation"]})
        # As text, which takes a fifth of the memory.
        photos.setdefault(target.image, (target.size, []))[1].append(json.dumps(target[2:]))
    out.declare("photos")
    for name, (size, targets) in photos.items():
        out.add("photos", [name, size, [json.loads(target) for target in targets]])
    out.meta["faulty"], out.meta["problems"] = faulty, tally.lines()


@contextmanager
def _noting(faulty: list[str], place: str) -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        faulty.append(f"{place}: {error}")


def _prompts(path: Path, faulty: list[str]) -> Iterator[Target]:
    """The rows of a CSV or JSONL: `image`, `mask`, `prompt` and, if wanted, `value`."""
    for place, row in _csv_rows(path) if path.suffix.lower() == ".csv" else _json_lines(path):
        with _noting(faulty, place):
            if None in row:
                raise ValueError("more cells than the header has; quote a prompt that holds a comma")
            cells = {name: "" if row.get(name) is None else str(row[name]).strip() for name in (*COLUMNS, "value")}
            empty = [f"{name} is empty" for name in COLUMNS if not cells[name]]
            if empty:
                raise ValueError(", ".join(empty))
            image, mask, prompt, value = cells.values()
            number = value.removesuffix(".0")  # tables turn whole numbers into these where cells are empty
            if not (number.isdecimal() and len(number) < 10 or not number):
                raise ValueError(f"value {value!r:.80} is no whole number of a pixel")
            yield Target(image, None, [prompt], {"file": mask, "value": int(number) if number else None}, place)


@contextmanager
def _text(path: Path) -> Iterator[TextIO]:
    """A CSV or JSONL. Raises UserError where it turns out to be none."""
    check_fetched(path)
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            yield file
    except (UnicodeDecodeError, csv.Error, json.JSONDecodeError) as error:
        raise UserError(f"{path} is no UTF-8 {path.suffix[1:].upper()} ({error}); save it as one") from error


def _csv_rows(path: Path) -> Iterator[tuple[str, dict]]:
    with _text(path) as file:
        rows = csv.DictReader(file, skipinitialspace=True, strict=True)
        header = [name.strip() for name in rows.fieldnames or []]
        rows.fieldnames = [name.lower() for name in header]
        absent = [name for name in COLUMNS if name not in rows.fieldnames]
        if absent:
            raise UserError(
                f"{path}, line 1: no column {', '.join(absent)}; found {', '.join(header) or 'nothing':.200}; "
                f"expected {','.join(COLUMNS)} and, if wanted, value, separated by commas ({HELP})"
            )
        for row in rows:
            yield f"line {rows.line_num}", row


def _json_lines(path: Path) -> Iterator[tuple[str, dict]]:
    with _text(path) as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                row = json.loads(line)
                if not isinstance(row, dict):
                    raise UserError(f"{path}, line {number}: {reprlib.repr(row)} is no object of {', '.join(COLUMNS)}")
                yield f"line {number}", row


def _coco(path: Path, faulty: list[str]) -> Iterator[Target]:
    """The annotations of a COCO-style JSON; the file is read once for each of its three lists, never held whole."""
    images: dict[int | str, tuple[str, list[int]]] = {}
    categories: dict[int | str, str] = {}
    met = set()
    for place, record in _placed(path, "images"):
        met.add("images")
        with _noting(faulty, place):
            id, name, height, width = _fields(record, id=(int, str), file_name=str, height=int, width=int)
            if id in images:
                raise ValueError(f"id {id!r} occurs twice")
            if height < 1 or width < 1:
                raise ValueError(f"height and width are {height} and {width}")
            images[id] = name, [height, width]
    for place, record in _placed(path, "categories"):
        with _noting(faulty, place):
            id, name = _fields(record, id=(int, str), name=str)
            categories[id] = name.strip()
    for place, record in _placed(path, "annotations"):
        met.add("annotations")
        with _noting(faulty, place):
            image_id, segmentation = _fields(record, image_id=(int, str), segmentation=(list, dict))
            if image_id not in images:
                raise ValueError(f"image_id {image_id!r} is not among the images")
            if not segmentation and record.get("bbox") and record.get("area"):
                raise ValueError("segmentation is empty beside a bbox and an area; a box is no outline")
            yield Target(*images[image_id], _sentences(record, categories), record, place)
    if len(met) < 2:
        raise UserError(f"{path} has no images or no annotations; a COCO-style object was expected ({HELP})")


def _placed(path: Path, name: str) -> Iterator[tuple[str, Any]]:
    """(place, record) of one of the lists of a COCO-style JSON."""
    for number, record in enumerate(stream_json(path, f"{name}.item")):
        yield f"{name}[{number}]", record


def _fields(record: Any, **kinds: type | tuple[type, ...]) -> list[Any]:
    """The values of fields that must be there. Raises ValueError naming those that are absent or of another type."""
    if not isinstance(record, dict):
        raise ValueError(f"{reprlib.repr(record)} is no object")
    faults = [
        f"{name} is {reprlib.repr(record[name])}" if name in record else f"it has no {name}"
        for name, kind in kinds.items()
        if not isinstance(record.get(name), kind) or isinstance(record[name], bool)
    ]
    if faults:
        raise ValueError(", ".join(faults))
    return [record[name] for name in kinds]


def _sentences(annotation: dict, categories: dict[int | str, str]) -> list[str]:
    """The captions and phrases of an annotation or, where it has none, the name of its category."""
    found: list[str] = []
    for field in SENTENCES:
        value = annotation.get(field) or []
        value = [value] if isinstance(value, str) else value
        if not isinstance(value, list) or not all(isinstance(text, str) for text in value):
            raise ValueError(f"{field} is {reprlib.repr(value)}, neither a string nor a list of strings")
        if not all(text.strip() for text in value):
            raise ValueError(f"{field} holds an empty sentence")
        found += [text.strip() for text in value]
    category = annotation.get("category_id")
    if not found and isinstance(category, (int, str)) and categories.get(category):
        found = [categories[category]]
    if not found:
        raise ValueError(f"neither captions nor phrases, and category {reprlib.repr(category)} has no name")
    return found


READERS = {".json": _coco, ".csv": _prompts, ".jsonl": _prompts}


def find_source(path: str | Path) -> Path:
    """The file that `path` is or, a folder, holds; a path that does not exist comes back as it is.

    Raises UserError when it is of another kind, or a folder that holds no CSV or several of them.
    """
    path = Path(path)
    if path.is_dir():
        found = sorted(file for file in path.glob("*.csv") if not file.name.startswith("."))
        if len(found) != 1:
            names = ", ".join(file.name for file in found[:5]) or "none"
            raise UserError(f"{path} should hold one .csv, found {names}; name a .csv, .jsonl or .json file ({HELP})")
        return found[0]
    if path.exists() and path.suffix.lower() not in READERS:
        raise UserError(f"{path}: expected a .json (COCO style), .csv, .jsonl, or a folder with one .csv ({HELP})")
    return path


def write_parts(source: Path, share: float) -> list[tuple[Path, int]]:
    """Divide own data by photo into files of its format beside it: [(path, photos)] of `_train` and `_val`.

    share: of the photos that go to `_val`, chosen at random, the same ones each time.
    Raises UserError where a file is there already, or a part would be empty.
    """
    paths = [source.with_name(f"{source.stem}_{part}{source.suffix}") for part in ("train", "val")]
    for path in paths:
        if path.exists():
            raise UserError(f"{path} exists; remove it before a new split")
    suffix = source.suffix.lower()
    if suffix == ".json":
        content = json.loads(source.read_text(encoding="utf-8-sig"))
        photos = [image["file_name"] for image in content["images"]]
    elif suffix == ".csv":
        with open(source, encoding="utf-8-sig", newline="") as file:
            header, *rows = (row for row in csv.reader(file, skipinitialspace=True) if row)
        column = [name.strip().lower() for name in header].index("image")
        photos = [row[column].strip() for row in rows]
    else:
        rows = [line for line in source.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
        photos = [str(json.loads(line)["image"]).strip() for line in rows]
    names = sorted(set(photos))
    count = round(share * len(names))
    if not 0 < count < len(names):
        raise UserError(f"--split {share} of {len(names)} photos leaves a part without any")
    chosen = {names[k] for k in np.random.default_rng(0).permutation(len(names))[:count]}
    for path, val in zip(paths, (False, True)):
        if suffix == ".json":
            images = [image for image in content["images"] if (image["file_name"] in chosen) == val]
            ids = {image["id"] for image in images}
            annotations = [each for each in content["annotations"] if each["image_id"] in ids]
            write_json(path, content | {"images": images, "annotations": annotations}, indent=None)
            continue
        own = [row for row, photo in zip(rows, photos) if (photo in chosen) == val]
        if suffix == ".csv":
            text = io.StringIO()
            csv.writer(text, lineterminator="\n").writerows([header, *own])
            write_text(path, text.getvalue())
        else:
            write_text(path, "".join(f"{line}\n" for line in own))
    return [(paths[0], len(names) - count), (paths[1], count)]
