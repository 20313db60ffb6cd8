"""Readers of the annotation formats; each turns one kind of file into tables (see `tables`).

A reader checks what it takes over: names are strings, ids are integers. A file that holds anything else is refused by
one UserError that names the location in it; `open_tables` adds the file.
"""

import codecs
import json
import pickle
import reprlib
from array import array
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import ijson
import numpy as np

from self1e.data.masks import contradiction
from self1e.data.paths import DATASETS
from self1e.data.tables import Writer
from self1e.errors import UserError


def stream_json(path: Path, name: str = "") -> Iterator[tuple[str, Any]]:
    """(location, value) of each value of a JSON file's top-level array, or of the array `name` in its object.

    A location is "images[3]", or "record 3 counted from 0". Raises UserError when the file is no UTF-8 JSON.
    """
    try:
        with open(path, "rb") as file:
            if file.read(3) != codecs.BOM_UTF8:
                file.seek(0)
            values = ijson.items(file, f"{name}.item" if name else "item", use_float=True)
            for number, value in enumerate(values):
                yield f"{name}[{number}]" if name else f"record {number} counted from 0", value
    except (ijson.JSONError, UnicodeDecodeError) as error:
        raise UserError(f"no complete UTF-8 JSON file ({error})") from error


def json_lines(path: Path) -> Iterator[tuple[str, Any]]:
    """("line 3", value) of each line of a JSONL file that is not blank. Raises UserError naming the line."""
    number = 0
    try:
        with open(path, encoding="utf-8-sig") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    yield f"line {number}", json.loads(line)
    except ValueError as error:  # no JSON, or no UTF-8
        raise UserError(f"line {number}: no UTF-8 JSONL ({error})") from error


def fields(record: Any, location: str, **kinds: type | tuple[type, ...]) -> list[Any]:
    """The values of a record's fields, in the order of `kinds`, which says their types; a bool is no int.

    Raises UserError that names `location` and every field that is absent or of another type.
    """
    if not isinstance(record, dict):
        raise UserError(f"{location}: {reprlib.repr(record)} is no object with {', '.join(kinds)}")
    faults = [
        f"{name} is {reprlib.repr(record[name])}" if name in record else f"it has no {name}"
        for name, kind in kinds.items()
        if name not in record or type(record[name]) not in (kind if isinstance(kind, tuple) else (kind,))
    ]
    if faults:
        raise UserError(f"{location}: {', '.join(faults)}")
    return [record[name] for name in kinds]


def counted(problems: dict[str, list]) -> list[str]:
    """One line for each kind of problem, from the places where it was met."""
    return [f"{len(places):,} x {kind} (first: {places[0]})" for kind, places in problems.items() if places]


def read_coco(path: Path, out: Writer) -> None:
    """COCO-style annotations (instances.json, PACO, PASCAL-Part).

    Tables `images` [file_name, height, width] and `annotations` {id, category_id, segmentation}; arrays `image_ids`,
    `annotation_ids` and `owner_ids` (image of each annotation); meta `categories` [[id, name], ...] and `problems`,
    what contradicts itself in the file.
    """
    image_ids, annotation_ids, owners = array("q"), array("q"), array("q")
    sizes, categories = {}, []
    problems: dict[str, list] = defaultdict(list)
    for location, image in stream_json(path, "images"):
        id, *entry = fields(image, location, id=int, file_name=str, height=int, width=int)
        out.add("images", entry)
        image_ids.append(id)
        sizes[id] = entry[1:]
    for location, annotation in stream_json(path, "annotations"):
        id, owner, category = fields(annotation, location, id=int, image_id=int, category_id=int)
        (segmentation,) = fields(annotation, location, segmentation=(list, dict))
        out.add("annotations", {"id": id, "category_id": category, "segmentation": segmentation})
        annotation_ids.append(id)
        owners.append(owner)
        if owner not in sizes:
            problems["annotation of an image that is not among the images"].append(f"annotation {id}")
        elif problem := contradiction(annotation, *sizes[owner]):
            problems[problem].append(f"annotation {id}")
    for location, category in stream_json(path, "categories"):
        categories.append(fields(category, location, id=int, name=str))
    if not image_ids or not annotation_ids:
        raise UserError(f"it has no images or no annotations; is this the right file? See {DATASETS}")
    for what, ids in ("image", image_ids), ("annotation", annotation_ids):
        found, times = np.unique(ids, return_counts=True)
        problems[f"{what} id that occurs twice"] += found[times > 1].tolist()
        out.array(f"{what}_ids", ids)
    out.array("owner_ids", owners)
    out.meta["categories"], out.meta["problems"] = categories, counted(problems)


class PlainUnpickler(pickle.Unpickler):
    """Builds plain containers, texts and numbers only, whatever a pickle from the web asks for."""

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")


def load_plain_pickle(path: Path) -> Any:
    """A pickle of plain values, without running code; `str` of Python 2 comes back as Latin-1. Raises UserError."""
    try:
        with open(path, "rb") as file:
            return PlainUnpickler(file, encoding="latin-1").load()
    except Exception as error:  # a corrupt pickle may raise almost anything, says the module's documentation
        raise UserError(f"no pickle of plain values ({error}); download it again") from error


def _text(value: str) -> str:
    """Python 2 wrote byte strings, which came back as Latin-1: UTF-8 where they are."""
    try:
        return value.encode("latin-1").decode("utf-8")
    except UnicodeError:
        return value


def read_refs(path: Path, out: Writer) -> None:
    """Referring expressions, `refs(*).p` or `grefs(*).json`, grouped by split and image.

    Table `groups` [image_id, [[ref_id, [ann ids], [[sent_id, sentence], ...]], ...]], array `group_images`, meta
    `splits` [[split string, first group, last + 1], ...]. Sentences of R-RefCOCO that are marked as meaning nothing
    (`exist` is false) are a reference of their own, without annotations; Ref-ZOM has its sentences under `raw`.
    """
    records: Iterable[tuple[str, Any]] = stream_json(path)
    if path.suffix != ".json":
        records = ((f"record {number} counted from 0", ref) for number, ref in enumerate(load_plain_pickle(path)))
    groups: dict[tuple[str, int], list] = defaultdict(list)
    for location, ref in records:
        ref_id, image_id, split = fields(ref, location, ref_id=int, image_id=int, split=str)
        ids, found = fields(ref, location, ann_id=(int, list, tuple), sentences=(list, tuple))
        sentences: dict[bool, list] = {True: [], False: []}  # by whether something in the photo is meant
        for k, sentence in enumerate(found):
            sentence = {"sent": sentence.get("raw"), "sent_id": k, "exist": True} | sentence
            sent_id, text, meant = fields(sentence, location, sent_id=int, sent=str, exist=bool)
            sentences[meant].append([sent_id, _text(text)])
        group = groups[split, image_id]
        if sentences[True] or not sentences[False]:
            group.append([ref_id, [ids] if isinstance(ids, int) else list(ids), sentences[True]])
        if sentences[False]:
            group.append([ref_id, [], sentences[False]])
    if not groups:
        raise UserError(f"it holds no list of references; is this the right file? See {DATASETS}")
    splits: dict[str, list[int]] = {}
    for number, (split, image) in enumerate(sorted(groups)):
        out.add("groups", [image, groups[split, image]])
        splits.setdefault(split, [number, number])[1] = number + 1
    out.array("group_images", [image for _, image in sorted(groups)])
    out.meta["splits"] = [[split, *numbers] for split, numbers in splits.items()]


def read_instructions(path: Path, out: Writer) -> None:
    """LLaVA conversations: table `items` [image, [[from, value], ...], id]."""
    for location, value in stream_json(path):
        id, image, turns = fields(value, location, id=(str, int), image=str, conversations=list)
        turns = [fields(turn, location, **{"from": str, "value": str}) for turn in turns]
        out.add("items", [image, turns, id])


def read_questions(path: Path, out: Writer) -> None:
    """Question lines (.jsonl): table `items` [image, question, answer or null]."""
    for location, value in json_lines(path):
        image, question = fields(value, location, image=str, question=str)
        if isinstance(answer := value.get("answer"), (list, dict)):
            raise UserError(f"{location}: answer is {reprlib.repr(answer)}")
        out.add("items", [image, question, None if answer is None else str(answer)])
