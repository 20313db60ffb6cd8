"""Compact indexes of the large annotation files, parsed once, memory-mapped by every rank and worker.

PACO's, COCO's and the question files are hundreds of MB of JSON. Each is read once, element by element, into a folder
of the cache (env SELF1E_CACHE, else ~/.cache/self1e): per table `<table>.bin` with one JSON text after another and
`<table>.offsets.npy`, plus integer arrays to look records up, and `meta.json`. No pickle. The folder's name holds a
hash of the source's path, size and modification time and of READER_VERSION.

Measured on a synthetic tree of the real sets' sizes (581,142 samples, 1.2 GB of annotations): 19 bytes of private
memory a sample for all opened indexes and file lists (11 MB), 74 with one epoch's plan for one rank and after every
record was read; the rest (1.7 kB a sample) are file pages that all ranks and workers share. Opening takes 0.5 s;
building, once, about a minute of CPU time and never more memory than the largest file's text (600 MB above the rest).
"""

import contextlib
import fcntl
import hashlib
import json
import mmap
import os
import pickle
import re
import shutil
import tempfile
from array import array
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from self1e.data.paths import README
from self1e.data.sample import image_key

READER_VERSION = 1
_blanks = re.compile(r"[ \t\r\n]*").match
_decode = json.JSONDecoder().raw_decode


# ---------------------------------------------------------------------------------------------- files on disk
class Records(Sequence):
    """Read-only list of JSON records; pickles as its path, opens its maps on first use."""

    def __init__(self, stem: Path):
        self.stem = stem
        self._map = None

    def __reduce__(self):
        return Records, (self.stem,)

    def _open(self) -> None:
        self._offsets = np.load(f"{self.stem}.offsets.npy", mmap_mode="r")
        with open(f"{self.stem}.bin", "rb") as file:
            # An empty file cannot be mapped.
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if self._offsets[-1] else b""

    def __len__(self) -> int:
        if self._map is None:
            self._open()
        return len(self._offsets) - 1

    def __getitem__(self, i: int) -> Any:
        if not 0 <= i < len(self):
            raise IndexError(i)
        return json.loads(self._map[self._offsets[i] : self._offsets[i + 1]])


class Index:
    """One indexed file: `index.table(name)`, `index.array(name)`, `index.meta`."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.meta = json.loads((folder / "meta.json").read_text())
        self._arrays = {}

    def __reduce__(self):
        return Index, (self.folder,)

    def table(self, name: str) -> Records:
        return Records(self.folder / name)

    def array(self, name: str) -> np.ndarray:
        if name not in self._arrays:
            self._arrays[name] = np.load(self.folder / f"{name}.npy", mmap_mode="r")
        return self._arrays[name]


class Writer:
    """Collects tables, arrays and meta data of one index in `folder`."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.meta = {}
        self._tables = {}

    def declare(self, *tables: str) -> None:
        for table in tables:
            self._tables[table] = open(self.folder / f"{table}.bin", "wb"), array("q", [0])

    def add(self, table: str, record: Any) -> None:
        self.add_text(table, json.dumps(record, ensure_ascii=False, separators=(",", ":")))

    def add_text(self, table: str, record: str) -> None:
        """A record that is JSON already."""
        file, offsets = self._tables[table]
        offsets.append(offsets[-1] + file.write(record.encode()))

    def array(self, name: str, values: Any) -> None:
        np.save(self.folder / f"{name}.npy", np.asarray(values, np.int64))

    def close(self, complete: bool) -> None:
        for name, (file, offsets) in self._tables.items():
            file.close()
            if complete:
                np.save(self.folder / f"{name}.offsets.npy", np.frombuffer(offsets, np.int64))
        if complete:
            (self.folder / "meta.json").write_text(json.dumps(self.meta))


def open_index(source: Path, read: Callable[[Path, Writer], None]) -> Index:
    """The index of `source`, built by `read` (one of the readers below) unless the cache holds it.

    One process of a machine builds, the others wait for it; a folder appears under its final name only when complete.
    Raises FileNotFoundError without the source, ValueError when it is corrupt or of another schema, and OSError that
    names SELF1E_CACHE when the cache cannot be written.
    """
    stat = source.stat()
    key = [str(source.resolve()), stat.st_size, stat.st_mtime_ns, read.__name__, READER_VERSION]
    name = f"{source.stem}-{hashlib.sha256(json.dumps(key).encode()).hexdigest()[:16]}"
    cache = Path(os.environ.get("SELF1E_CACHE") or Path.home() / ".cache" / "self1e")
    final = cache / name
    if final.is_dir():
        return Index(final)
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with open(cache / f"{name}.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not final.is_dir():
                _build(source, read, final)
    except OSError as error:
        raise OSError(
            f"cannot write the index of {source} to {cache} ({error}); "
            "set SELF1E_CACHE to a folder with room for about the size of the annotation files"
        ) from error
    return Index(final)


def _build(source: Path, read: Callable[[Path, Writer], None], final: Path) -> None:
    folder = Path(tempfile.mkdtemp(prefix=f"{final.name}.", dir=final.parent))
    writer = Writer(folder)
    try:
        try:
            read(source, writer)
        except BaseException:
            with contextlib.suppress(OSError):  # buffers that no longer fit the disk; the cause is on its way up
                writer.close(complete=False)
            raise
        writer.close(complete=True)
        folder.chmod(0o755)  # a cache may be shared among users
        with contextlib.suppress(FileExistsError):  # another machine that shares the cache was first
            if not final.is_dir():
                os.rename(folder, final)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


# ---------------------------------------------------------------------------------------------- parsing
def stream_json(path: Path) -> Iterator[tuple[str | None, Any, str]]:
    """Elements of a JSON file one by one, so that memory holds its text but never its whole tree.

    A top-level array gives (None, element, its text); a top-level object gives (key, element, its text) for members
    that are arrays with elements and (key, value, its text) for others, an empty array among them. Raises ValueError
    naming the file when it is no UTF-8 JSON.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
        start = _blanks(text).end()
        yield from _array(text, start, None) if text[start] == "[" else _object(text, start)
    except (ValueError, IndexError) as error:
        raise ValueError(f"{path} is not a complete UTF-8 JSON file ({error}); download it again") from error


def _array(text: str, position: int, key: str | None):
    """Yields (key, element, its text) from the bracket at `position`; returns the position after the closing one."""
    position = _blanks(text, position + 1).end()
    if text[position] == "]":
        return position + 1
    while True:
        value, stop = _decode(text, position)
        yield key, value, text[position:stop]
        position = _blanks(text, stop).end()
        if text[position] == "]":
            return position + 1
        if text[position] != ",":
            raise json.JSONDecodeError("Expecting ',' or ']'", text, position)
        position = _blanks(text, position + 1).end()


def _object(text: str, position: int):
    if text[position] != "{":
        raise json.JSONDecodeError("Expecting an array or an object", text, position)
    position = _blanks(text, position + 1).end()
    while text[position] != "}":
        key, position = _decode(text, position)
        position = _blanks(text, position).end()
        if text[position] != ":":
            raise json.JSONDecodeError("Expecting ':'", text, position)
        position = _blanks(text, position + 1).end()
        if text[position] == "[" and text[_blanks(text, position + 1).end()] != "]":
            position = yield from _array(text, position, key)
        else:
            value, stop = _decode(text, position)
            yield key, value, text[position:stop]
            position = stop
        position = _blanks(text, position).end()
        if text[position] == ",":
            position = _blanks(text, position + 1).end()
        elif text[position] != "}":
            raise json.JSONDecodeError("Expecting ',' or '}'", text, position)


@contextlib.contextmanager
def expected_schema(path: Path):
    """Turns a missing key or a value of another type into a ValueError that names the file."""
    try:
        yield
    except KeyError as error:
        raise ValueError(f"{path}: key {error} is missing; is this the right file? See {README}") from error
    except (TypeError, AttributeError) as error:
        raise ValueError(f"{path}: unexpected structure ({error}); is this the right file? See {README}") from error


class _PlainUnpickler(pickle.Unpickler):
    """Builds dict, list, tuple, str, bytes, numbers; anything that needs a class or a function is refused."""

    def find_class(self, module: str, name: str):
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, a list of references holds plain values only")

    def persistent_load(self, pid: Any):
        raise pickle.UnpicklingError("it holds persistent ids")


def load_plain_pickle(path: Path) -> Any:
    """A pickle of plain containers, without running code. Python 2 `str` comes back as bytes (see `_text`).

    Raises ValueError naming the file when it is corrupt or holds anything else.
    """
    with open(path, "rb") as file:
        try:
            return _PlainUnpickler(file, encoding="bytes").load()
        except Exception as error:  # a corrupt pickle may raise almost anything, says the module's documentation
            raise ValueError(f"{path} is no pickle of plain values ({error}); download it again") from error


def _text(value: str | bytes) -> str:
    """Python 2 wrote byte strings: UTF-8 where they are, Latin-1 elsewhere."""
    if isinstance(value, str):
        return value
    try:
        return value.decode("utf-8")
    except UnicodeDecodeError:
        return value.decode("latin-1")


def _texts(mapping: dict) -> dict:
    return {_text(key): value for key, value in mapping.items()}


# ---------------------------------------------------------------------------------------------- readers
def read_coco(path: Path, out: Writer) -> None:
    """COCO-style annotations (instances.json, PACO, PASCAL-Part).

    Tables `images` [file_name, height, width] and `annotations` (as they are), in file order; array `image_keys`,
    parallel to `images`; sorted ids with their rows: `image_ids`, `image_order`; `annotation_ids`, `annotation_order`;
    `owner_ids`, `owner_order` (image of each annotation); meta `categories` [[id, name], ...].
    """
    image_ids, keys, annotation_ids, owners, categories = array("q"), array("q"), array("q"), array("q"), []
    seen = set()
    out.declare("images", "annotations")
    with expected_schema(path):
        for key, value, text in stream_json(path):
            seen.add(key)
            if value == []:
                continue
            if key == "images":
                out.add("images", [value["file_name"], value["height"], value["width"]])
                image_ids.append(value["id"])
                keys.append(image_key(value["file_name"]))
            elif key == "annotations":
                for field in ("category_id", "segmentation"):
                    if field not in value:
                        raise KeyError(field)
                out.add_text("annotations", text)  # writing the numbers again would take half of the time
                annotation_ids.append(value["id"])
                owners.append(value["image_id"])
            elif key == "categories":
                categories.append([value["id"], value["name"]])
        for key in ("images", "annotations", "categories"):
            if key not in seen:
                raise KeyError(key)
    out.array("image_keys", keys)
    for name, ids in ("image", image_ids), ("annotation", annotation_ids), ("owner", owners):
        ids = np.frombuffer(ids, np.int64)
        order = np.argsort(ids, kind="stable")
        out.array(f"{name}_order", order)
        out.array(f"{name}_ids", ids[order])
    out.meta["categories"] = categories


def read_refs(path: Path, out: Writer) -> None:
    """Referring expressions, `refs(*).p` or `grefs(*).json`, grouped by split and image.

    Table `groups` [image_id, [[ref_id, [ann ids], [[sent_id, sentence], ...]], ...]], array `group_images`, meta
    `splits` [[split string, first group, last + 1], ...].
    """
    refs = [value for _, value, _ in stream_json(path)] if path.suffix == ".json" else load_plain_pickle(path)
    groups = {}
    out.declare("groups")
    with expected_schema(path):
        if not isinstance(refs, list):
            raise TypeError(f"a {type(refs).__name__}, not a list")
        for ref in map(_texts, refs):
            ids = ref["ann_id"] if isinstance(ref["ann_id"], (list, tuple)) else [ref["ann_id"]]
            sentences = [
                [sentence.get("sent_id", k), _text(sentence["sent"])]
                for k, sentence in enumerate(map(_texts, ref["sentences"]))
            ]
            place = _text(ref["split"]), int(ref["image_id"])
            groups.setdefault(place, []).append([ref["ref_id"], list(map(int, ids)), sentences])
    splits = {}
    for row, place in enumerate(sorted(groups)):
        out.add("groups", [place[1], groups[place]])
        splits.setdefault(place[0], [row, row])[1] = row + 1
    out.array("group_images", [image for _, image in sorted(groups)])
    out.meta["splits"] = [[split, *rows] for split, rows in splits.items()]


def read_instructions(path: Path, out: Writer) -> None:
    """LLaVA conversations: table `items` [id, image, [[from, value], ...]], array `image_keys`."""
    keys = array("q")
    out.declare("items")
    with expected_schema(path):
        for key, value, _ in stream_json(path):
            if key is not None:
                raise TypeError("an object, not a list of conversations")
            turns = [[turn["from"], turn["value"]] for turn in value["conversations"]]
            out.add("items", [value["id"], value["image"], turns])
            keys.append(image_key(value["image"]))
    out.array("image_keys", keys)


def read_questions(path: Path, out: Writer) -> None:
    """Question lines (.jsonl): table `items` [image, question, answer or null], array `image_keys`."""
    keys = array("q")
    out.declare("items")
    with open(path, encoding="utf-8") as lines, expected_schema(path):
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                value = json.loads(line)
            except ValueError as error:
                raise ValueError(f"{path}, line {number}, is no JSON ({error}); download it again") from error
            answer = value.get("answer")
            out.add("items", [value["image"], value["question"], None if answer is None else str(answer)])
            keys.append(image_key(value["image"]))
    out.array("image_keys", keys)


class CocoIndex:
    """Look-ups in a COCO-style file; memory-mapped (see `read_coco`)."""

    def __init__(self, path: Path):
        self.path = path
        self._index = open_index(path, read_coco)
        self._images = self._index.table("images")
        self._annotations = self._index.table("annotations")
        self.categories: dict[int, str] = dict(map(tuple, self._index.meta["categories"]))

    @property
    def image_keys(self) -> np.ndarray:
        """`image_key` of each image, int64, in file order."""
        return self._index.array("image_keys")

    @property
    def image_ids(self) -> np.ndarray:
        """Image ids in file order."""
        ids = np.empty_like(self._index.array("image_ids"))
        ids[self._index.array("image_order")] = self._index.array("image_ids")
        return ids

    def image_rows(self, image_ids: np.ndarray | Sequence[int]) -> np.ndarray:
        """Row of each image id in file order. Raises KeyError for an unknown one."""
        ids = self._index.array("image_ids")
        places = np.searchsorted(ids, image_ids)
        found = np.append(ids, -1)[places] == image_ids if len(ids) else np.zeros(len(places), bool)
        if not found.all():
            raise KeyError(f"image id {np.asarray(image_ids)[~found][0]}")
        return self._index.array("image_order")[places]

    def image(self, row: int) -> tuple[str, int, int]:
        """(file name, height, width)."""
        return tuple(self._images[row])

    def annotation(self, annotation_id: int) -> dict:
        """As in the file: id, image_id, category_id, segmentation, ... Raises KeyError for an unknown id."""
        ids = self._index.array("annotation_ids")
        place = np.searchsorted(ids, annotation_id)
        if place == len(ids) or ids[place] != annotation_id:
            raise KeyError(f"annotation id {annotation_id}")
        return self._annotations[int(self._index.array("annotation_order")[place])]

    def annotation_rows(self, image_id: int) -> np.ndarray:
        """Rows of all annotations of an image, in file order; read one with `annotation_at`."""
        owners = self._index.array("owner_ids")
        start, stop = np.searchsorted(owners, image_id), np.searchsorted(owners, image_id, side="right")
        return self._index.array("owner_order")[start:stop]

    def annotation_at(self, row: int) -> dict:
        return self._annotations[int(row)]
