"""Own data: photos, masks and sentences without a place in the README's tree.

A source is one of

    train.json    COCO style: `images`, `annotations`, `categories`; an annotation's `captions` or `phrases` (a string
                  or a list) are its sentences, without them the name of its category is
    train.csv     columns `image,mask,prompt`, optionally `value`; a row is one sentence, a photo may have several
    a folder      that holds one such CSV

Files are named relative to the folder of the JSON or CSV, or to `images/` (photos) and `masks/` in it; they must lie
in there (see `paths.inside`). A mask is a
one-channel PNG: foreground is where it is `value`, or, without one, above 0. One sentence on several annotations of a
photo means all of them: its mask is their union. What ends like a sentence is asked as it is; all else is a phrase,
lower-cased ("the red car").
"""

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from self1e.data.masks import decode_segmentation, load_label_map
from self1e.data.paths import inside
from self1e.data.samples import SampleError, image_keys
from self1e.data.sets.custom_source import HELP, READERS, find_source
from self1e.data.sets.expressions import Expression, ExpressionData, ExpressionSet, ExpressionSplit
from self1e.data.tables import open_tables
from self1e.errors import UserError
from self1e.flags import counted
from self1e.model.prompts import looks_like_sentence

NAME = "custom"
SHOWN = 50  # problems in one error message


class CustomData(ExpressionData):
    """The photos of one source that have sentences, in file order; `name` is "custom|<path>". A target is a number.

    Faulty records are left out; `check` refuses them.
    """

    def __init__(self, path: str | Path, *, allow_outside: bool = False):
        self.name = f"{NAME}|{path}"
        self.source = find_source(path)
        self.allow_outside = allow_outside
        self._index = open_tables(self.source, READERS[self.source.suffix.lower()])
        self._photos, self._targets = self._index.records("photos"), self._index.records("targets")
        self._categories = dict(map(tuple, self._index.meta["categories"]))
        self._rows = np.flatnonzero(np.diff(self._index.array("starts")))

    def __len__(self) -> int:
        return len(self._rows)

    def faults(self) -> list[str]:
        """ "<place>: <what>" of every faulty record, and of every photo and mask file that is not on disk."""
        wanted: dict[tuple[str, str], str] = {}  # (file, folder) -> where it is named first
        for item in range(len(self)):
            for file, place in self._files(item):
                wanted.setdefault(file, place)
        absent = (self._absent(file, place) for file, place in wanted.items())
        return [*self._index.meta["problems"], *filter(None, absent)]

    def complete(self, item: int) -> bool:
        """Whether all files of a photo are on disk; `faults` names those that are not."""
        return not any(self._absent(file, place) for file, place in self._files(item))

    def _files(self, item: int) -> Iterator[tuple[tuple[str, str], str]]:
        """((name, folder below the source's), where it is named) of the photo and of its mask files."""
        name, _, place = self._photo(item)
        yield (name, "images"), f"{place}: image"
        if self.source.suffix.lower() == ".csv":
            for number in self._numbers(item):
                _, (mask, _), place = self._targets[number]
                yield (mask, "masks"), f"{place}: mask"

    def _absent(self, file: tuple[str, str], place: str) -> str | None:
        """What is wrong with a file that is not on disk."""
        name, below = file
        folder = self.source.parent
        try:
            found = os.path.isfile(self._find(name, below))
        except UserError as error:
            return f"{place}: {error}"
        return None if found else f"{place} {name} is neither in {folder} nor in {folder / below}"

    def check(self) -> None:
        """Raises one ValueError that names every problem."""
        problems = self.faults()
        if problems:
            more = [f"and {len(problems) - SHOWN} more"] if len(problems) > SHOWN else []
            lines = "\n  ".join(problems[:SHOWN] + more)
            raise UserError(f"{self.source}, {counted(len(problems), 'problem')} ({HELP}):\n  {lines}")

    def image_keys(self) -> np.ndarray:
        """`image_key` of each photo: COCO's number, or one of the file's place, since own names mean little."""
        names = (self._photo(item)[0] for item in range(len(self)))
        return image_keys(os.path.realpath(self.source.parent / self._place(name, "images")) for name in names)

    def _photo(self, item: int) -> tuple[str, list[int] | None, str]:
        return self._photos[int(self._rows[item])]

    def _numbers(self, item: int) -> list[int]:
        """Numbers of a photo's targets."""
        start, stop = self._index.array("starts")[self._rows[item] : self._rows[item] + 2]
        return self._index.array("order")[start:stop].tolist()

    def _place(self, name: str, below: str) -> str:
        """A file's name relative to the source's folder, whether it stands there or in the folder `below`."""
        return name if os.path.exists(self.source.parent / name) else f"{below}/{name}"

    def _find(self, name: str, below: str) -> Path:
        """Where a file is. Raises ValueError for a name that leads out of the source's folder."""
        inside(self.source.parent, name, allow_outside=self.allow_outside)
        return inside(self.source.parent, self._place(name, below), allow_outside=self.allow_outside)

    def file_name(self, item: int) -> str:
        return self._photo(item)[0]

    def expressions(self, item: int) -> list[Expression]:
        """Sentences that are asked alike are one. Which of them mean nothing is known only to their masks."""
        found: dict[str, tuple[str, list[int]]] = {}
        for number in self._numbers(item):
            sentences, _, _ = self._targets[number]
            for text in sentences if isinstance(sentences, list) else [self._categories[sentences]]:
                asked = text if looks_like_sentence(text) else text.lower()
                found.setdefault(asked, (text, []))[1].append(number)
        return [
            Expression(text, numbers, str(k), looks_like_sentence(text))
            for k, (text, numbers) in enumerate(found.values())
        ]

    def where(self, target: int) -> str:
        return self._targets[target][2]

    def photo(self, item: int, id: str) -> Path:
        return self._open(self.file_name(item), "images", id)

    def _open(self, name: str, below: str, id: str) -> Path:
        """`_find` that raises SampleError."""
        try:
            return self._find(name, below)
        except UserError as error:
            raise SampleError(id, str(error)) from error

    def mask(self, item: int, target: int, id: str) -> np.ndarray:
        _, size, _ = self._photo(item)
        _, segmentation, place = self._targets[target]
        if size is None:  # a CSV
            file, value = segmentation
            labels = load_label_map(self._open(file, "masks", id), id)
            return (labels > 0 if value is None else labels == value).astype(np.uint8)
        try:
            return decode_segmentation(segmentation, *size)
        except ValueError as error:
            raise SampleError(id, f"{place}: malformed segmentation ({error})") from error


class CustomSet(ExpressionSet):
    """Training photos of one source; a row is one sentence."""

    data: CustomData
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
        self.name = f"{NAME}|{data.source.name}"

    @classmethod
    def paths(cls, dataset_dir: Path, data_dir: Path, source: str | Path | None = None) -> list[Path]:
        return [] if source is None else [find_source(source)]


class CustomSplit(ExpressionSplit):
    """One source for evaluation; `name` is "custom|<path>", a unit is one sentence."""

    data: CustomData

    def __init__(self, name: str, dataset_dir: Path, *, allow_outside: bool = False):
        super().__init__(name, CustomData(_path(name), allow_outside=allow_outside))
        self.data.check()
        if not len(self.data):
            raise UserError(f"{self.data.source} holds no sentence to evaluate")

    @staticmethod
    def paths(name: str, dataset_dir: Path) -> list[Path]:
        return [find_source(_path(name))]


def _path(name: str) -> str:
    return name.removeprefix(f"{NAME}|")
