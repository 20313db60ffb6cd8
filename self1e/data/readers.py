"""Parsers of the annotation formats, and the readers that turn each kind of file into an index.

A reader checks what it takes over: names are strings, ids are integers, sizes are those of a picture. A file that
holds anything else, or is nested without end, is refused by one ValueError that names it.
"""

import contextlib
import io
import json
import pickle
import pickletools
import re
import reprlib
from array import array
from collections import Counter
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from self1e.data.masks import check_size, is_short_part
from self1e.data.paths import DATASETS
from self1e.data.samples import image_key
from self1e.data.tables import Writer

Element = tuple[str | None, Any, str]  # (key, value, its text), see `stream_json`
_BLANKS = re.compile(r"[ \t\r\n]*")
_decode = json.JSONDecoder().raw_decode


# ------------------------------------------------------------------------------------------------ JSON
def stream_json(path: Path, out: Writer | None = None, *, remedy: str = "download it again") -> Iterator[Element]:
    """Elements of a JSON file one by one, so that memory holds its text but never its whole tree.

    A top-level array gives (None, element, its text); a top-level object gives (key, element, its text) for members
    that are arrays with elements and (key, value, its text) for others, an empty array among them. Raises ValueError
    naming the file and the `remedy` when it is no UTF-8 JSON. `out` is told how far the file is read.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
        start = _after_blanks(text, 0)
        done = start
        for element in _array(text, start, None) if text[start] == "[" else _object(text, start):
            done += len(element[2])
            if out is not None:
                out.progress(done, len(text))
            yield element
    except (ValueError, IndexError, RecursionError) as error:
        raise ValueError(f"{path} is not a complete UTF-8 JSON file ({error}); {remedy}") from error


def _after_blanks(text: str, position: int) -> int:
    match = _BLANKS.match(text, position)
    assert match  # it matches the empty text
    return match.end()


def _array(text: str, position: int, key: str | None) -> Generator[Element, None, int]:
    """Yields (key, element, its text) from the bracket at `position`; returns the position after the closing one."""
    position = _after_blanks(text, position + 1)
    if text[position] == "]":
        return position + 1
    while True:
        value, stop = _decode(text, position)
        yield key, value, text[position:stop]
        position = _after_blanks(text, stop)
        if text[position] == "]":
            return position + 1
        if text[position] != ",":
            raise json.JSONDecodeError("Expecting ',' or ']'", text, position)
        position = _after_blanks(text, position + 1)


def _object(text: str, position: int) -> Iterator[Element]:
    if text[position] != "{":
        raise json.JSONDecodeError("Expecting an array or an object", text, position)
    position = _after_blanks(text, position + 1)
    while text[position] != "}":
        key, position = _decode(text, position)
        if not isinstance(key, str):
            raise json.JSONDecodeError("Expecting a name", text, position)
        position = _after_blanks(text, position)
        if text[position] != ":":
            raise json.JSONDecodeError("Expecting ':'", text, position)
        position = _after_blanks(text, position + 1)
        if text[position] == "[" and text[_after_blanks(text, position + 1)] != "]":
            position = yield from _array(text, position, key)
        else:
            value, stop = _decode(text, position)
            yield key, value, text[position:stop]
            position = stop
        position = _after_blanks(text, position)
        if text[position] == ",":
            position = _after_blanks(text, position + 1)
        elif text[position] != "}":
            raise json.JSONDecodeError("Expecting ',' or '}'", text, position)


@contextlib.contextmanager
def expected_schema(path: Path, place: Callable[[], str] = lambda: "") -> Iterator[None]:
    """Turns a missing key or a value of another type into a ValueError that names the file, and the place in it."""
    try:
        yield
    except KeyError as error:
        message = f"{path}{place()}: key {error} is missing; is this the right file? See {DATASETS}"
        raise ValueError(message) from error
    except (TypeError, AttributeError, OverflowError) as error:
        message = f"{path}{place()}: unexpected structure ({error}); is this the right file? See {DATASETS}"
        raise ValueError(message) from error


def shown(value: Any) -> str:
    """A value of a stranger's file for a message; short, also where its containers are shared without end."""
    return reprlib.repr(value)


def take(record: Any, key: str, *kinds: type) -> Any:
    """`record[key]`, of one of `kinds`; a bool is no int. Raises KeyError, or TypeError saying what stands there."""
    value = record[key]
    if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
        expected = " or ".join(kind.__name__ for kind in kinds)
        raise TypeError(f"{key} is {shown(value)}, not {expected}")
    return value


# ------------------------------------------------------------------------------------------------ pickles
# What plain containers, texts and numbers are made of; every other opcode names a class, a function or an outside id.
_PLAIN_OPCODES = frozenset(
    "PROTO FRAME STOP MARK POP POP_MARK DUP MEMOIZE PUT BINPUT LONG_BINPUT GET BINGET LONG_BINGET NONE NEWTRUE "
    "NEWFALSE INT BININT BININT1 BININT2 LONG LONG1 LONG4 FLOAT BINFLOAT STRING BINSTRING SHORT_BINSTRING UNICODE "
    "SHORT_BINUNICODE BINUNICODE BINUNICODE8 BINBYTES SHORT_BINBYTES BINBYTES8 EMPTY_LIST APPEND APPENDS LIST "
    "EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 EMPTY_DICT DICT SETITEM SETITEMS".split()
)


class _PlainUnpickler(pickle.Unpickler):
    """A second lock behind the opcodes: it finds no class, whatever asks for one."""

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")


def load_plain_pickle(path: Path, out: Writer | None = None) -> Any:
    """A pickle of plain containers, without running code. Python 2 `str` comes back as bytes (see `_text`).

    Its opcodes are read first, all of them: one that is not plain is refused, and so is a memo larger than the file,
    for which the unpickler would reserve memory; `out` is told how far they are. Raises ValueError naming the file
    when it is corrupt or not plain.
    """
    raw = path.read_bytes()
    try:
        for number, (opcode, argument, place) in enumerate(pickletools.genops(io.BytesIO(raw))):
            if out is not None and number % 4096 == 0:
                out.progress(place or 0, len(raw))
            if opcode.name not in _PLAIN_OPCODES:
                asked = f" {argument!r:.100}" if argument is not None else ""
                raise pickle.UnpicklingError(f"it holds {opcode.name}{asked}; a list of references is plain values")
            if "PUT" in opcode.name and int(argument or 0) > len(raw):
                raise pickle.UnpicklingError("its memo is larger than the file")
        return _PlainUnpickler(io.BytesIO(raw), encoding="bytes").load()
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


# ------------------------------------------------------------------------------------------------ readers
class Oddities:
    """Counts segmentations that have a settled meaning although they are not what they should be.

    Meta `oddities`: [["empty" or "short parts", how many, the first place], ...].
    """

    def __init__(self) -> None:
        self.found: dict[str, tuple[int, str]] = {}

    def look(self, segmentation: Any, place: str) -> None:
        """Count one segmentation; `place` says where it stands."""
        if segmentation == [] or isinstance(segmentation, list) and any(map(is_short_part, segmentation)):
            kind = "short parts" if segmentation else "empty"
            count, first = self.found.get(kind, (0, place))
            self.found[kind] = count + 1, first

    def close(self, out: Writer) -> None:
        out.meta["oddities"] = [[kind, count, first] for kind, (count, first) in self.found.items()]


def remarks_on(oddities: list[list[Any]], file: str, *, empty: str) -> list[str]:
    """One sentence per kind of oddity of a file; `empty` says what becomes of an empty segmentation."""
    meaning = {
        "empty": f"with an empty segmentation {empty}",
        "short parts": "with polygon parts of fewer than 6 or an odd count of numbers, which count as empty",
    }
    return [f"{file}: {count:,} annotations {meaning[kind]} (first: {first})" for kind, count, first in oddities]


def read_coco(path: Path, out: Writer) -> None:
    """COCO-style annotations (instances.json, PACO, PASCAL-Part).

    Tables `images` [file_name, height, width] and `annotations` (as they are), in file order; array `image_keys`,
    parallel to `images`; sorted ids with their rows: `image_ids`, `image_order`; `annotation_ids`, `annotation_order`;
    `owner_ids`, `owner_order` (image of each annotation); meta `categories` [[id, name], ...] and `oddities`.
    """
    image_ids, keys, annotation_ids, owners, categories = array("q"), array("q"), array("q"), array("q"), []
    oddities, place = Oddities(), ""
    counts: Counter[str | None] = Counter()
    out.declare("images", "annotations")
    with expected_schema(path, lambda: place):
        for key, value, text in stream_json(path, out):
            counts[key] += 1
            if value == []:
                continue
            place = f", {key}[{counts[key] - 1}]"
            if key == "images":
                name = take(value, "file_name", str)
                height, width = (take(value, side, int) for side in ("height", "width"))
                check_size(height, width)
                out.add("images", [name, height, width])
                image_ids.append(take(value, "id", int))
                keys.append(image_key(name))
            elif key == "annotations":
                take(value, "category_id", int)
                annotation_ids.append(take(value, "id", int))
                owners.append(take(value, "image_id", int))
                oddities.look(take(value, "segmentation", list, dict), f"annotation {value['id']}")
                out.add_text("annotations", text)  # writing the numbers again would take half of the time
            elif key == "categories":
                categories.append([take(value, "id", int), take(value, "name", str)])
        place = ""
        for key in ("images", "annotations", "categories"):
            if key not in counts:
                raise KeyError(key)
    out.array("image_keys", keys)
    for name, numbers in ("image", image_ids), ("annotation", annotation_ids), ("owner", owners):
        ids = np.frombuffer(numbers, np.int64)
        order = np.argsort(ids, kind="stable")
        out.array(f"{name}_order", order)
        out.array(f"{name}_ids", ids[order])
    out.meta["categories"] = categories
    oddities.close(out)


def read_refs(path: Path, out: Writer) -> None:
    """Referring expressions, `refs(*).p` or `grefs(*).json`, grouped by split and image.

    Table `groups` [image_id, [[ref_id, [ann ids], [[sent_id, sentence], ...]], ...]], array `group_images`, meta
    `splits` [[split string, first group, last + 1], ...]. Sentences of R-RefCOCO that are marked as meaning nothing
    (`exist` is false) are a reference of their own, without annotations; Ref-ZOM has its sentences under `raw`.
    """
    refs = (
        [value for _, value, _ in stream_json(path, out)] if path.suffix == ".json" else load_plain_pickle(path, out)
    )
    groups: dict[tuple[str, int], list] = {}
    left = path.stat().st_size  # containers of a pickle may be shared: no more sentences than bytes
    out.declare("groups")
    place = ""
    with expected_schema(path, lambda: place):
        if not isinstance(refs, list):
            raise TypeError(f"a {type(refs).__name__}, not a list")
        for row, ref in enumerate(refs):
            place = f", record {row} counted from 0"
            ref = _texts(ref)
            ids = take(ref, "ann_id", int, list, tuple)
            ids = [ids] if isinstance(ids, int) else list(ids)
            if not all(type(id) is int for id in ids):
                raise TypeError(f"ann_id is {shown(ids)}")
            sentences: dict[bool, list] = {True: [], False: []}  # by whether something in the photo is meant
            for k, sentence in enumerate(map(_texts, take(ref, "sentences", list, tuple)[:left])):
                text = _text(take({"sent": sentence.get("raw")} | sentence, "sent", str, bytes))
                number = take({"sent_id": k} | sentence, "sent_id", int)
                sentences[take({"exist": True} | sentence, "exist", bool)].append([number, text])
            left -= sum(map(len, sentences.values())) + len(ids)
            if left < 0:
                raise TypeError("more sentences than the file has bytes")
            key = _text(take(ref, "split", str, bytes)), take(ref, "image_id", int)
            found = groups.setdefault(key, [])
            if sentences[True] or not sentences[False]:
                found.append([take(ref, "ref_id", int), ids, sentences[True]])
            if sentences[False]:
                found.append([take(ref, "ref_id", int), [], sentences[False]])
        splits: dict[str, list[int]] = {}
        for row, key in enumerate(sorted(groups)):
            out.add("groups", [key[1], groups[key]])
            splits.setdefault(key[0], [row, row])[1] = row + 1
        out.array("group_images", [image for _, image in sorted(groups)])
    out.meta["splits"] = [[split, *rows] for split, rows in splits.items()]


def read_instructions(path: Path, out: Writer) -> None:
    """LLaVA conversations: table `items` [id, image, [[from, value], ...]], array `image_keys`."""
    keys = array("q")
    out.declare("items")
    with expected_schema(path, lambda: f", record {len(keys)} counted from 0"):
        for key, value, _ in stream_json(path, out):
            if key is not None:
                raise TypeError("an object, not a list of conversations")
            turns = [
                [take(turn, "from", str), take(turn, "value", str)] for turn in take(value, "conversations", list)
            ]
            out.add("items", [take(value, "id", str, int), take(value, "image", str), turns])
            keys.append(image_key(value["image"]))
    out.array("image_keys", keys)


def read_questions(path: Path, out: Writer) -> None:
    """Question lines (.jsonl): table `items` [image, question, answer or null], array `image_keys`."""
    keys = array("q")
    out.declare("items")
    number = 0
    try:
        with open(path, encoding="utf-8") as lines, expected_schema(path, lambda: f", line {number}"):
            for number, line in enumerate(lines, 1):
                if not line.strip():
                    continue
                try:
                    value = json.loads(line)
                except (ValueError, RecursionError) as error:
                    raise ValueError(f"{path}, line {number}, is no JSON ({error}); download it again") from error
                answer = take({"answer": None} | value, "answer", str, int, float, bool, type(None))
                question = take(value, "question", str)
                out.add("items", [take(value, "image", str), question, None if answer is None else str(answer)])
                keys.append(image_key(value["image"]))
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no UTF-8 text ({error}); download it again") from error
    out.array("image_keys", keys)
