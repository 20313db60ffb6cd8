"""Own data: photos, masks and sentences without a place in the README's tree.

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

import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from self1e.data.masks import decode_segmentation, load_label_map
from self1e.data.paths import inside
from self1e.data.samples import SampleError, image_keys
from self1e.data.sets.custom_source import HELP, find_source, read_source
from self1e.data.sets.expressions import Expression, ExpressionData, ExpressionSet, ExpressionSplit
from self1e.data.tables import open_tables
from self1e.errors import UserError
from self1e.model.prompts import looks_like_sentence

log = logging.getLogger(__name__)
NAME = "custom"
LISTED = 50  # problems in one error message


class CustomData(ExpressionData):
    """The photos of one source that have sentences, in file order; `name` is "custom|<path>".

    A target is the number of a mask among those of its photo.

    faulty:   "<place>: <what>" of the records that are left out; training and evaluation refuse them
    absent:   the same of masks read so far that do not hold the value that their record asks for, and so are empty
    """

    def __init__(self, path: str | Path, *, allow_outside: bool = False):
        self.name = f"{NAME}|{path}"
        self.source = find_source(path)
        self.allow_outside = allow_outside
        tables = open_tables(self.source, read_source)
        self._photos = tables.records("photos")
        self._last: tuple[int, Any] = (-1, None)
        self.faulty: list[str] = tables.meta["faulty"]
        self.problems = [f"{self.source.name}: {problem}" for problem in tables.meta["problems"]]
        self.absent: dict[str, str] = {}

    def __len__(self) -> int:
        return len(self._photos)

    def _record(self, item: int) -> tuple[str, list[int] | None, list]:
        """Name, [height, width] or None, and [sentences, mask, place] of each mask of a photo."""
        if self._last[0] != item:
            self._last = item, self._photos[item]
        return self._last[1]

    def check(self) -> None:
        """Raise one UserError that names every faulty record, and every photo and mask file that is not on disk."""
        faults = dict.fromkeys(self.faulty)
        files = {}
        for item in tqdm(range(len(self)), f"files of {self.source.name}", delay=2, leave=False):
            for name, below, place in self._files(item):
                files.setdefault((name, below), place)
        for (name, below), place in files.items():
            try:
                self._find(name, below, place)
            except SampleError as error:
                faults[str(error)] = None
        if faults:
            more = [f"and {len(faults) - LISTED} more"] if len(faults) > LISTED else []
            lines = "\n  ".join([*list(faults)[:LISTED], *more])
            raise UserError(f"{self.source}, problems: {len(faults)} ({HELP}):\n  {lines}")
        if not len(self):
            raise UserError(f"{self.source} holds no photo with a sentence")

    def _files(self, item: int) -> Iterator[tuple[str, str, str]]:
        """(name, folder below the source's, where it is named) of a photo and of its mask files."""
        name, _, targets = self._record(item)
        yield name, "images", f"{targets[0][2]}: image"
        for _, mask, place in targets:
            if "file" in mask:
                yield mask["file"], "masks", f"{place}: mask"

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
        """`image_key` of each photo: COCO's number, or one of the file's place, since own names mean little."""
        folder = os.path.realpath(self.source.parent)
        return image_keys(f"{folder}/{self.file_name(item)}" for item in range(len(self)))

    def file_name(self, item: int) -> str:
        return self._record(item)[0]

    def expressions(self, item: int) -> list[Expression]:
        """Sentences that are asked in the same words are one. Which of them mean nothing only their masks know."""
        found: dict[str, tuple[str, list[int]]] = {}
        for number, (sentences, _, _) in enumerate(self._record(item)[2]):
            for text in sentences:
                asked = text if looks_like_sentence(text) else text.lower()
                found.setdefault(asked, (text, []))[1].append(number)
        return [
            Expression(text, numbers, str(k), looks_like_sentence(text))
            for k, (text, numbers) in enumerate(found.values())
        ]

    def photo(self, item: int, id: str) -> Path:
        return self._find(self.file_name(item), "images", f"{self._record(item)[2][0][2]}: image")

    def where(self, target: int) -> str:
        return self._record(self._last[0])[2][target][2]

    def mask(self, item: int, target: int, id: str) -> np.ndarray:
        _, size, targets = self._record(item)
        _, mask, place = targets[target]
        if size is not None:
            try:
                return decode_segmentation(mask["segmentation"], *size)
            except ValueError as error:
                raise SampleError(id, f"{place}: malformed segmentation ({error})") from error
        labels = load_label_map(self._find(mask["file"], "masks", f"{place}: mask"), id)
        if mask["value"] is None:
            return (labels > 0).astype(np.uint8)
        found = labels == mask["value"]
        if not found.any():
            if not self.absent:
                log.warning("%s: %s: no pixel of %s has the value %d", id, place, mask["file"], mask["value"])
            self.absent[place] = f"no pixel of {mask['file']} has the value {mask['value']}"
        return found.astype(np.uint8)


class CustomSet(ExpressionSet):
    """Training photos of one source; a conversation is one sentence."""

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
        data = CustomData(source, allow_outside=allow_outside)
        data.check()
        super().__init__(data, conversations=conversations)
        self.name = data.name

    @classmethod
    def paths(cls, dataset_dir: Path, data_dir: Path, source: str | Path = "") -> list[Path]:
        return [find_source(source)]


class CustomSplit(ExpressionSplit):
    """One source for evaluation; `name` is "custom|<path>", a unit is one sentence."""

    def __init__(self, name: str, dataset_dir: Path, *, allow_outside: bool = False):
        data = CustomData(name.removeprefix(f"{NAME}|"), allow_outside=allow_outside)
        data.check()
        super().__init__(name, data)

    @staticmethod
    def paths(name: str, dataset_dir: Path) -> list[Path]:
        return [find_source(name.removeprefix(f"{NAME}|"))]
