"""Annotation files, parsed once and memory-mapped by every rank and worker: `open_tables(path, read_coco)`.

A reader, `read_*`, turns one kind of file into records of named tables; those of one set stand beside it in `sets/`.
It checks what it takes over: names are strings, ids are integers. A file that holds anything else is refused by one
UserError that names the location in it.

Tables lie in a folder of the cache (env SELF1E_CACHE, else ~/.cache/self1e), whose name holds a hash of the source's
path, size and modification time and of VERSION: `texts` holds one JSON text after another, and `<table>.npy` where the
records of a table begin and end in it, and the keys of each.
"""

import codecs
import errno
import hashlib
import json
import logging
import os
import pickle
import reprlib
from array import array
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import ijson
import numpy as np
from filelock import FileLock

from self1e.data.masks import contradiction
from self1e.data.samples import DATASETS
from self1e.errors import UserError
from self1e.files import check_fetched, replacing

log = logging.getLogger(__name__)
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES)  # of a disk that takes no more, or nothing
VERSION = 11  # of what the readers write
Records = Iterable[tuple[str, Any, *tuple[int, ...]]]  # of a reader: table, what JSON can hold, integer keys


class Table(Sequence[Any]):
    """Read-only list of JSON records, memory-mapped; pickles as the names of its files."""

    def __init__(self, folder: Path, name: str):
        self.folder, self.name = folder, name
        numbers = np.load(folder / f"{name}.npy", mmap_mode="r")
        self._bounds, self.keys = numbers[:, :2], numbers[:, 2:]  # int64 (records, 2), (records, keys of each)
        self._texts = np.memmap(folder / "texts", mode="r")

    def __reduce__(self):
        return Table, (self.folder, self.name)

    def __len__(self) -> int:
        return len(self._bounds)

    def __getitem__(self, i: int) -> Any:  # type: ignore[override]  # records are never sliced
        begin, end = self._bounds[i]
        return json.loads(self._texts[begin:end].tobytes())

    def having(self, key: int, column: int = 0) -> list[Any]:
        """The records with a key, in their order."""
        return [self[int(i)] for i in np.flatnonzero(self.keys[:, column] == key)]


def open_tables(source: Path, read: Callable[[Path], Records]) -> dict[str, Any]:
    """The tables of `source`, built by `read` (one of `readers`) unless the cache holds them.

    One process of a machine builds, the others wait for it; a folder appears under its final name only when complete.
    Raises UserError when the source is corrupt or of another schema, or the cache cannot be written.
    """
    stat = source.stat()
    key = [str(source.resolve()), stat.st_size, stat.st_mtime_ns, read.__name__, VERSION]
    name = f"{source.stem}-{hashlib.sha256(json.dumps(key).encode()).hexdigest()[:16]}"
    cache = Path(os.environ.get("SELF1E_CACHE") or Path.home() / ".cache" / "self1e")
    folder = cache / name
    if not folder.is_dir():
        check_fetched(source)
        if stat.st_size > 50e6:
            log.info("reading %s (%.1f GB), once for all runs", source, stat.st_size / 1e9)
        try:
            cache.mkdir(parents=True, exist_ok=True)
            with FileLock(cache / f"{name}.lock"):
                if not folder.is_dir():
                    with replacing(folder, folder=True) as partial:
                        _write(read(source), partial)
        except UserError as error:
            raise UserError(f"{source}: {error}") from error
        except OSError as error:
            if error.errno not in FULL:
                raise
            advice = "set SELF1E_CACHE to a folder with room for about the size of the annotation files"
            raise UserError(f"cannot write the tables of {source} to {cache} ({error}); {advice}") from error
    return defaultdict(list, {path.stem: Table(folder, path.stem) for path in folder.glob("*.npy")})


def _write(records: Records, folder: Path) -> None:
    numbers: dict[str, array] = defaultdict(lambda: array("q"))
    widths, end = {}, 0
    with open(folder / "texts", "wb") as texts:
        for table, record, *keys in records:
            begin, end = end, end + texts.write(json.dumps(record, separators=(",", ":")).encode())
            numbers[table].extend((begin, end, *keys))
            widths[table] = 2 + len(keys)
    for table, width in widths.items():
        columns = np.asfortranarray(np.array(numbers[table]).reshape(-1, width))  # so that `having` reads one of them
        np.save(folder / f"{table}.npy", columns)


def stream_json(path: Path, name: str = "") -> Iterator[tuple[str, Any]]:
    """(location, value) of each value of a JSON file's top-level array, or of the array `name` in its object.

    A location is "images[3]", or "record 3 counted from 0". Raises UserError when the file is no UTF-8 JSON.
    """
    try:
        with open(path, "rb") as file:
            file.seek(3 if file.read(3) == codecs.BOM_UTF8 else 0)
            values = ijson.items(file, f"{name}.item" if name else "item", use_float=True)
            for number, value in enumerate(values):
                yield f"{name}[{number}]" if name else f"record {number} counted from 0", value
    except (ijson.JSONError, UnicodeDecodeError) as error:
        raise UserError(f"no complete UTF-8 JSON file ({error})") from error


def json_lines(path: Path) -> Iterator[tuple[str, Any]]:
    """("line 3", value) of each line of a JSONL file that is not blank. Raises UserError naming the line."""
    with open(path, "rb") as lines:
        for number, line in enumerate(lines, 1):
            try:
                if line.strip():
                    yield f"line {number}", json.loads(line.removeprefix(codecs.BOM_UTF8))
            except ValueError as error:  # no JSON, or no UTF-8
                raise UserError(f"line {number}: no UTF-8 JSONL ({error})") from error


def fields(record: Any, location: str, **kinds: type | tuple[type, ...]) -> list[Any]:
    """The values of a record's fields, in the order of `kinds`, which says their types; a bool is no int.

    Raises UserError that names `location` and a field that is absent or of another type.
    """
    for name, kind in kinds.items():
        if not isinstance(record, dict) or name not in record:
            raise UserError(f"{location}: it has no {name}")
        if type(record[name]) not in (kind if isinstance(kind, tuple) else (kind,)):
            raise UserError(f"{location}: {name} is {reprlib.repr(record[name])}")
    return [record[name] for name in kinds]


def counted(path: Path, problems: dict[str, list]) -> Records:
    """Table `problems`: one line for each kind of problem, from the places where it was met."""
    for kind, places in problems.items():
        yield "problems", f"{path.name}: {len(places):,} x {kind} (first: {places[0]})"


def read_coco(path: Path) -> Records:
    """COCO-style annotations (instances.json, PACO, PASCAL-Part).

    Tables `images` [file_name, height, width] with their id as key, `annotations` [id, category_id, segmentation] with
    their id and that of their image, `categories` [id, name], and `problems`, what contradicts itself in the file.
    """
    sizes: dict[int, list[int]] = {}
    seen: set[int] = set()  # ids of annotations
    problems: dict[str, list] = defaultdict(list)
    for location, image in stream_json(path, "images"):
        id, *entry = fields(image, location, id=int, file_name=str, height=int, width=int)
        yield "images", entry, id
        if id in sizes:
            problems["image id that occurs twice"].append(id)
        sizes[id] = entry[1:]
    for location, annotation in stream_json(path, "annotations"):
        id, owner = fields(annotation, location, id=int, image_id=int)
        yield "annotations", [id, *fields(annotation, location, category_id=int, segmentation=(list, dict))], id, owner
        if id in seen:
            problems["annotation id that occurs twice"].append(id)
        seen.add(id)
        if owner not in sizes:
            problems["annotation of an image that is not among the images"].append(f"annotation {id}")
        elif problem := contradiction(annotation, *sizes[owner]):
            problems[problem].append(f"annotation {id}")
    for location, category in stream_json(path, "categories"):
        yield "categories", fields(category, location, id=int, name=str)
    if not sizes or not seen:
        raise UserError(f"it has no images or no annotations; is this the right file? See {DATASETS}")
    yield from counted(path, problems)


class PlainUnpickler(pickle.Unpickler):
    """Builds plain containers, texts and numbers only, whatever a pickle from the web asks for."""

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")


def load_plain_pickle(path: Path) -> Any:
    """A pickle of plain values, without running code; `str` of Python 2 is read as UTF-8. Raises UserError."""
    try:
        with open(path, "rb") as file:
            return PlainUnpickler(file, encoding="utf-8").load()
    except Exception as error:  # a corrupt pickle may raise almost anything, says the module's documentation
        raise UserError(f"no pickle of plain values ({error}); download it again") from error
