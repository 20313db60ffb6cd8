"""Readers of the annotation formats; each turns one kind of file into tables (see `tables`).

A reader checks what it takes over: names are strings, ids are integers. A file that holds anything else is refused by
one UserError that names it and the place in it.
"""

import codecs
import contextlib
import json
import pickle
import reprlib
from array import array
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import ijson
import numpy as np

from self1e.data.masks import contradiction
from self1e.data.paths import DATASETS
from self1e.data.samples import image_key
from self1e.data.tables import Writer
from self1e.errors import UserError


def stream_json(path: Path, prefix: str = "item") -> Iterator[Any]:
    """Values of a JSON file one by one: "item" means those of the top-level array, "images.item" those of `images`.

    Raises UserError naming the file when it is no UTF-8 JSON.
    """
    try:
        with open(path, "rb") as file:
            if file.read(3) != codecs.BOM_UTF8:
                file.seek(0)
            yield from ijson.items(file, prefix, use_float=True)
    except (ijson.JSONError, UnicodeDecodeError) as error:
        check_fetched(path)
        raise UserError(f"{path} is not a complete UTF-8 JSON file ({error})") from error


def check_fetched(path: Path) -> None:
    """Raise UserError for a file that is a pointer of Git LFS."""
    with open(path, "rb") as file:
        if file.read(24) == b"version https://git-lfs.":
            raise UserError(f"{path} is a Git LFS pointer: fetch the file itself with `git lfs pull`")


@contextlib.contextmanager
def expected_schema(path: Path, place: Callable[[], str] = lambda: "") -> Iterator[None]:
    """Turns a missing key or a value of another type into a UserError that names the file, and the place in it."""
    try:
        yield
    except KeyError as error:
        message = f"{path}{place()}: key {error} is missing; is this the right file? See {DATASETS}"
        raise UserError(message) from error
    except (TypeError, AttributeError) as error:
        message = f"{path}{place()}: unexpected structure ({error}); is this the right file? See {DATASETS}"
        raise UserError(message) from error


def take(record: Any, key: str, *kinds: type) -> Any:
    """`record[key]`, of one of `kinds`; a bool is no int. Raises KeyError, or TypeError saying what stands there."""
    value = record[key]
    if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
        expected = " or ".join(kind.__name__ for kind in kinds)
        raise TypeError(f"{key} is {reprlib.repr(value)}, not {expected}")
    return value


class Tally:
    """How often each kind of problem was met, and where first."""

    def __init__(self) -> None:
        self.found: dict[str, tuple[int, str]] = {}

    def add(self, kind: str | None, place: str) -> None:
        if kind is not None:
            count, first = self.found.get(kind, (0, place))
            self.found[kind] = count + 1, first

    def lines(self) -> list[str]:
        """One line per kind."""
        return [f"{count:,} x {kind} (first: {first})" for kind, (count, first) in self.found.items()]


def read_coco(path: Path, out: Writer) -> None:
    """COCO-style annotations (instances.json, PACO, PASCAL-Part).

    Tables `images` [file_name, height, width] and `annotations` {id, category_id, segmentation}, in file order; array
    `image_keys`, parallel to `images`; sorted ids with their numbers: `image_ids`, `image_order`; `annotation_ids`,
    `annotation_order`; `owner_ids`, `owner_order` (image of each annotation); meta `categories` [[id, name], ...] and
    `problems`, what contradicts itself in the file.
    """
    keys, sizes, categories, tally, place = array("q"), {}, [], Tally(), ""
    ids: dict[str, array[int]] = {what: array("q") for what in ("image", "annotation", "owner")}
    out.declare("images", "annotations")
    with expected_schema(path, lambda: place):
        for number, image in enumerate(stream_json(path, "images.item")):
            place = f", images[{number}]"
            name, height, width = take(image, "file_name", str), take(image, "height", int), take(image, "width", int)
            out.add("images", [name, height, width])
            ids["image"].append(take(image, "id", int))
            keys.append(image_key(name))
            tally.add("image id that occurs twice" if image["id"] in sizes else None, str(image["id"]))
            sizes[image["id"]] = height, width
        for number, annotation in enumerate(stream_json(path, "annotations.item")):
            place = f", annotations[{number}]"
            id, category = take(annotation, "id", int), take(annotation, "category_id", int)
            segmentation = take(annotation, "segmentation", list, dict)
            out.add("annotations", {"id": id, "category_id": category, "segmentation": segmentation})
            ids["annotation"].append(id)
            ids["owner"].append(take(annotation, "image_id", int))
            size = sizes.get(annotation["image_id"])
            tally.add(None if size else "annotation of an image that is not among the images", f"annotation {id}")
            if size:
                tally.add(contradiction(annotation, *size), f"annotation {id}")
        for number, category in enumerate(stream_json(path, "categories.item")):
            place = f", categories[{number}]"
            categories.append([take(category, "id", int), take(category, "name", str)])
        place = ""
        for what, key in ("image", "images"), ("annotation", "annotations"):
            if not ids[what]:
                raise KeyError(key)
    out.array("image_keys", keys)
    for what, numbers in ids.items():
        found = np.frombuffer(numbers, np.int64)
        order = np.argsort(found, kind="stable")
        out.array(f"{what}_order", order)
        out.array(f"{what}_ids", found[order])
        if what == "annotation":
            for id in found[order][1:][np.diff(found[order]) == 0]:
                tally.add("annotation id that occurs twice", str(id))
    out.meta["categories"], out.meta["problems"] = categories, tally.lines()


# ------------------------------------------------------------------------------------------------ expressions


class PlainUnpickler(pickle.Unpickler):
    """Builds plain containers, texts and numbers only, whatever a pickle from the web asks for."""

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")


def load_plain_pickle(path: Path) -> Any:
    """A pickle of plain values, without running code; `str` of Python 2 comes back as bytes (see `_text`).

    Raises UserError naming the file when it is corrupt or asks for anything else.
    """
    try:
        with open(path, "rb") as file:
            return PlainUnpickler(file, encoding="bytes").load()
    except Exception as error:  # a corrupt pickle may raise almost anything, says the module's documentation
        raise UserError(f"{path} is no pickle of plain values ({error}); download it again") from error


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


def read_refs(path: Path, out: Writer) -> None:
    """Referring expressions, `refs(*).p` or `grefs(*).json`, grouped by split and image.

    Table `groups` [image_id, [[ref_id, [ann ids], [[sent_id, sentence], ...]], ...]], array `group_images`, meta
    `splits` [[split string, first group, last + 1], ...]. Sentences of R-RefCOCO that are marked as meaning nothing
    (`exist` is false) are a reference of their own, without annotations; Ref-ZOM has its sentences under `raw`.
    """
    refs = stream_json(path) if path.suffix == ".json" else load_plain_pickle(path)
    groups: dict[tuple[str, int], list] = {}
    out.declare("groups")
    place = ""
    with expected_schema(path, lambda: place):
        for number, ref in enumerate(refs):
            place = f", record {number} counted from 0"
            ref = _texts(ref)
            ids = take(ref, "ann_id", int, list, tuple)
            ids = [ids] if isinstance(ids, int) else list(ids)
            if not all(type(id) is int for id in ids):
                raise TypeError(f"ann_id is {reprlib.repr(ids)}")
            sentences: dict[bool, list] = {True: [], False: []}  # by whether something in the photo is meant
            for k, sentence in enumerate(map(_texts, take(ref, "sentences", list, tuple))):
                text = _text(take({"sent": sentence.get("raw")} | sentence, "sent", str, bytes))
                sent_id = take({"sent_id": k} | sentence, "sent_id", int)
                sentences[take({"exist": True} | sentence, "exist", bool)].append([sent_id, text])
            key = _text(take(ref, "split", str, bytes)), take(ref, "image_id", int)
            found = groups.setdefault(key, [])
            if sentences[True] or not sentences[False]:
                found.append([take(ref, "ref_id", int), ids, sentences[True]])
            if sentences[False]:
                found.append([take(ref, "ref_id", int), [], sentences[False]])
    if not groups:
        raise UserError(f"{path} holds no list of references; is this the right file? See {DATASETS}")
    splits: dict[str, list[int]] = {}
    for number, key in enumerate(sorted(groups)):
        out.add("groups", [key[1], groups[key]])
        splits.setdefault(key[0], [number, number])[1] = number + 1
    out.array("group_images", [image for _, image in sorted(groups)])
    out.meta["splits"] = [[split, *numbers] for split, numbers in splits.items()]


# -------------------------------------------------------------------------------------------------- questions


def read_instructions(path: Path, out: Writer) -> None:
    """LLaVA conversations: table `items` [id, image, [[from, value], ...]], array `image_keys`."""
    keys = array("q")
    out.declare("items")
    with expected_schema(path, lambda: f", record {len(keys)} counted from 0"):
        for value in stream_json(path):
            turns = [
                [take(turn, "from", str), take(turn, "value", str)] for turn in take(value, "conversations", list)
            ]
            out.add("items", [take(value, "id", str, int), take(value, "image", str), turns])
            keys.append(image_key(value["image"]))
    if not keys:
        raise UserError(f"{path} holds no list of conversations; is this the right file? See {DATASETS}")
    out.array("image_keys", keys)


def read_questions(path: Path, out: Writer) -> None:
    """Question lines (.jsonl): table `items` [image, question, answer or null], array `image_keys`."""
    keys, number = array("q"), 0
    out.declare("items")
    try:
        with open(path, encoding="utf-8-sig") as lines, expected_schema(path, lambda: f", line {number}"):
            for line in lines:
                number += 1
                if not line.strip():
                    continue
                value = json.loads(line)
                answer = take({"answer": None} | value, "answer", str, int, float, bool, type(None))
                question = take(value, "question", str)
                out.add("items", [take(value, "image", str), question, None if answer is None else str(answer)])
                keys.append(image_key(value["image"]))
    except ValueError as error:  # no JSON, or no UTF-8
        raise UserError(f"{path}, line {number}: no line of UTF-8 JSON ({error})") from error
    out.array("image_keys", keys)
