"""What a data set is: numbered samples, made of files that annotation files name.

Every set is a `TrainingSet`; an `ExpressionSet` (`sets/expressions.py`) is a sequence of `EvalImage`s, too. Everything
downstream (mixture, processor, evaluation) knows only these.
"""

import hashlib
import os
import re
import unicodedata
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PureWindowsPath
from typing import Any, BinaryIO, Self

import numpy as np
from PIL import Image

from self1e.errors import UserError
from self1e.model.prompts import IMAGE_TAG, SEG, reserved_in

DATASETS, OWN_DATA = "docs/data.md, section Datasets", "docs/data.md, section Own data"
COCO_NAME = re.compile(r"(?:COCO_(?:train|val)2014_)?(\d{12})\.(?:jpg|png)")


@contextmanager
def naming(what: str) -> Iterator[None]:
    """What is wrong with a user's files begins with the sample or the place in a file that it is about."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{what}: {error}") from error


@dataclass
class Sample:
    """One image with its conversations."""

    id: str  # "<set>/<image file or record number>", printed in logs
    image: Image.Image  # RGB, EXIF orientation applied
    conversations: list[list[str]]  # each user, assistant, user, ...; the first turn starts with "<image>" and "\n"
    masks: list[np.ndarray]  # of each, uint8 {0, 1} (n_seg, H, W) at the annotation's size; n_seg = "[SEG]" in it
    replaced: tuple[str, ...] = ()  # the broken samples that this one replaces, "<id>: <cause>"


def list_names(folder: Path, suffix: str) -> list[str]:
    """Sorted names of the files of a folder that end with `suffix`, without hidden ones such as a Mac's `._x.jpg`."""
    return sorted(path.name for path in folder.glob(f"[!.]*{suffix}"))


def inside(folder: Path, name: str, *, allow_outside: bool = False) -> Path:
    """The path of a file that an annotation file, perhaps a stranger's, names relative to `folder`. Raises UserError.

    A name may not lead out of the folder, unless `allow_outside`, but links are followed. One with accents is found in
    either of its Unicode forms.
    """
    windows = PureWindowsPath(name)
    if not allow_outside and (name.startswith("/") or windows.drive or ".." in windows.parts or "\0" in name):
        raise UserError(f"{name!r:.200} leads out of {folder}; if that is meant, add --allow_outside")
    if max(map(len, name.encode(errors="replace").split(b"/"))) > 255:
        raise UserError(f"{name!r:.200} is no file's name: it has more than 255 bytes")
    path = folder / name
    if not name.isascii() and not path.exists():
        forms = (unicodedata.normalize(form, name).encode(errors="replace") for form in ("NFC", "NFD"))
        path = next((other for form in forms if (other := folder / os.fsdecode(form)).exists()), path)
    if "\\" in name and not path.exists():
        raise UserError(f"{name!r:.200} has backslashes, which separate folders on Windows alone; write slashes")
    return path


def image_key(name: str) -> int:
    """A 64-bit key of a photo in several sets: COCO's number, which names spell differently, else a hash below 0."""
    if coco := COCO_NAME.fullmatch(name.rsplit("/", 1)[-1]):
        return int(coco[1])
    return -1 - int.from_bytes(hashlib.blake2b(name.encode(errors="surrogateescape"), digest_size=7).digest(), "big")


def check_texts(texts: Iterable[str]) -> None:
    """Raise UserError where a text holds a control token, such as [SEG], or is no Unicode text."""
    for text in texts:
        if found := reserved_in(text):
            raise UserError(f"{text!r:.200} holds the reserved token {found[0]}")
        if any("\ud800" <= character <= "\udfff" for character in text):
            raise UserError(f"{text!r:.200} is no Unicode text")


def draw(items: Sequence[Any], count: int, rng: np.random.Generator) -> list[Any]:
    """At most `count` of the items, without repetition, in random order."""
    return [items[i] for i in rng.choice(len(items), min(count, len(items)), replace=False)]


class TrainingSet(ABC):
    """Numbered samples; a sub-class and its entry in `families.FAMILIES` are all that a new set takes.

    A sub-class writes five members: `files` (or `paths`), `open`, `__len__`, `file_name` and `read`. The rest is the
    same for all sets, unless one differs. A set is made from its name and the flags of training, of which it takes
    those that it knows, and then `opened`.
    """

    cap: int | None = None  # samples that one pass over the set takes at most; each pass draws its own
    segmentation = True  # its samples carry masks
    rated = True  # the rate of its family multiplies it; otherwise it counts once
    redrawn = False  # the mixture "published" draws its samples with replacement
    files: tuple[str, ...] = ()  # what must exist below dataset_dir before the set is opened; the first is its own
    folder: Path  # photos are named relative to it
    problems: Sequence[str] = ()  # what is wrong with its files as a whole; said by training and by check-data

    def __init__(
        self,
        name: str,  # as selected: "ade20k", "refcoco|unc|val", "custom|own/t.csv"; `open` may shorten it for logs
        dataset_dir: Path | str,
        data_dir: Path | str = "",
        *,
        num_classes_per_sample: int = 3,  # the most conversations of a training sample
        allow_outside: bool = False,  # photos may lie elsewhere (see `inside`)
        **flags: Any,
    ):
        self.name, self.conversations, self.allow_outside = name, num_classes_per_sample, allow_outside
        self.dataset_dir, self.data_dir, self.flags = Path(dataset_dir), Path(data_dir), flags

    def paths(self) -> list[Path]:
        """Files and folders that must exist before the set is opened; the first is its own."""
        return [self.dataset_dir / file for file in self.files]

    def opened(self) -> Self:
        """The set, ready to be read. Raises UserError for missing files and for those of another schema."""
        require_paths([self])
        self.open(*self.paths())
        return self

    @abstractmethod
    def open(self, *paths: Any) -> None:
        """Open the set, of which `paths` are. Raises UserError."""

    @abstractmethod
    def __len__(self) -> int:
        """Number of records on disk."""

    @abstractmethod
    def file_name(self, index: int) -> str:
        """Name of a record's photo in the annotations."""

    def id(self, index: int) -> str:
        """How messages call a record."""
        return f"{self.name}/{self.file_name(index)}"

    def photo(self, index: int) -> Path | BinaryIO:
        """Where the photo of a record is. Raises UserError."""
        return inside(self.folder, self.file_name(index), allow_outside=self.allow_outside)

    def image_keys(self) -> np.ndarray:
        """`image_key` of every record's photo, int64 (len,)."""
        return np.fromiter((image_key(self.file_name(index)) for index in range(len(self))), np.int64)

    @abstractmethod
    def read(self, index: int, rng: np.random.Generator) -> Sample | None:
        """The sample of record `index` in [0, len), whose random choices come from `rng` alone.

        None when it has no usable label: the next record serves in its place. Raises UserError when it is broken.
        """

    def sample(self, index: int, rng: np.random.Generator) -> Sample | None:
        """As `read`. Raises UserError under the record's id, also for control tokens but the [SEG] of the masks."""
        with naming(self.id(index)):
            sample = self.read(index, rng)
            for turns, masks in zip(sample.conversations, sample.masks, strict=True) if sample else ():
                asked = [turns[0].removeprefix(f"{IMAGE_TAG}\n"), *turns[2::2]]
                check_texts(asked + [text.replace(SEG, "", len(masks)) for text in turns[1::2]])
        return sample


def missing(data: TrainingSet) -> list[Path]:
    """The paths of a set or split that are not on disk."""
    return [path for path in data.paths() if not path.exists()]


def require_paths(sets: Iterable[TrainingSet]) -> None:
    """Raise one UserError that names every path of the sets and splits, not opened yet, that is not on disk."""
    users: dict[Path, dict[str, None]] = defaultdict(dict)  # missing path -> names, each once
    for data in sets:
        for path in missing(data):
            users[path][data.name] = None
    if users:
        where = f"missing data; {DATASETS}, says what goes where, and scripts/get_data.sh fetches sets:"
        raise UserError("\n  ".join([where, *(f"{path}   ({', '.join(names)})" for path, names in users.items())]))
