"""What a data set yields, and the two small interfaces of this package.

A `TrainingSet` holds numbered samples, each a pure function of (item, generator). An `EvalSplit` is a sequence of
`EvalImage`, each one photo with its sentences and masks. Everything downstream (mixture, processor, evaluator) knows
only these.
"""

import hashlib
import logging
import re
import struct
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, TypeVar

import numpy as np
from PIL import Image, UnidentifiedImageError

from self1e.data.paths import DATASETS, inside
from self1e.model.photos import as_rgb, open_picture
from self1e.model.prompts import IMAGE_TAG, SEG, evaluation_prompt, reserved_in

log = logging.getLogger(__name__)
T = TypeVar("T")

ORIENTATION_TAG = 0x0112
DIGESTED, DIGESTED_BYTES = 16, 1 << 20  # records of a set, and bytes of each of their files, that join its digest
COCO_NAME = re.compile(r"(?:COCO_(?:train|val)2014_)?(\d{12})\.(?:jpg|png)")
# Everything Pillow is known to raise for files that are missing, truncated, or not what their name says.
UNREADABLE = (OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error, Image.DecompressionBombError)


@cache
def say_once(remark: str) -> None:
    """Log a remark on the data, once per process."""
    log.info(remark)


class SampleError(Exception):
    """A sample that cannot be built: its photo or annotation is broken. `id` names the sample, `cause` says why."""

    def __init__(self, id: str, cause: str):
        super().__init__(id, cause)
        self.id = id
        self.cause = cause

    def __str__(self) -> str:
        return f"{self.id}: {self.cause}"


@dataclass
class Sample:
    """One image with its conversations.

    id:            "<set>/<image file or record number>", printed in logs
    image:         RGB, EXIF orientation applied
    conversations: rows; a row: user, assistant, user, ...; the first user turn starts with "<image>\\n"
    masks:         one per row, uint8 {0, 1} (n_seg, H, W) at the annotation's size; n_seg = "[SEG]" in the row
    replaced:      (id, cause) of the broken samples whose place this one took
    """

    id: str
    image: Image.Image
    conversations: list[list[str]]
    masks: list[np.ndarray]
    replaced: tuple[tuple[str, str], ...] = ()


def why_unreadable(error: BaseException) -> str:
    """What Pillow found wrong with a file, without the name that stands in front of it anyway."""
    if isinstance(error, UnidentifiedImageError):
        return "it is no picture of a known format, or an empty file"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error)


def load_oriented(path: Path | str | BinaryIO, id: str | None = None) -> tuple[Image.Image, int]:
    """The photo in RGB, EXIF orientation applied, and the orientation tag it had (1 to 8, 1 = stored upright).

    Raises SampleError, under `id` or the path, when the file is missing, truncated or no image.
    """
    try:
        with open_picture(path) as stored:
            orientation = stored.getexif().get(ORIENTATION_TAG, 1)
            image = as_rgb(stored)
    except UNREADABLE as error:
        raise SampleError(id or str(path), f"cannot read {path}: {why_unreadable(error)}") from error
    return image, orientation if orientation in range(1, 9) else 1


def load_image(path: Path | str | BinaryIO, id: str | None = None) -> Image.Image:
    """The photo in RGB, EXIF orientation applied. Raises SampleError (see `load_oriented`)."""
    return load_oriented(path, id)[0]


@dataclass(frozen=True)
class PhotoFolder:
    """The photos that annotation files name relative to one folder; see `paths.inside` for names that leave it."""

    folder: Path
    allow_outside: bool = False

    def load(self, name: str, id: str) -> tuple[Image.Image, int]:
        """A photo and its orientation tag, as `load_oriented`. Raises SampleError under `id`."""
        return load_oriented(self.path(name, id), id)

    def path(self, name: str, id: str) -> Path:
        """Where a photo is. Raises SampleError under `id` for a name that leads out of the folder."""
        try:
            return inside(self.folder, name, allow_outside=self.allow_outside)
        except ValueError as error:
            raise SampleError(id, str(error)) from error


def image_key(name: str) -> int:
    """A 64-bit key under which one photo is found in several sets: COCO's number, else a (negative) hash of the name.

    COCO photos go by different names in different sets (`COCO_train2014_000000000009.jpg`, `000000000009.png`); all
    others are named alike wherever they appear.
    """
    coco = COCO_NAME.fullmatch(name.rsplit("/", 1)[-1])
    if coco:
        return int(coco[1])
    return -1 - int.from_bytes(hashlib.blake2b(name.encode(), digest_size=7).digest(), "big")


def image_keys(names: Iterable[str]) -> np.ndarray:
    """`image_key` of each name, int64 (n,)."""
    return np.fromiter((image_key(name) for name in names), np.int64)


class Annotation(NamedTuple):
    """One segmentation of a record in the form of COCO, for checks of the data.

    place: where it stands, such as "annotation 12". height, width: pixels of the frame of its numbers.
    """

    place: str
    segmentation: list | dict
    height: int
    width: int


def forged(texts: Iterable[str]) -> str | None:
    """What is wrong with texts that hold a control token, such as [SEG] or <|im_end|>, or half a character."""
    for text in texts:
        if found := reserved_in(text):
            return f"{text!r:.200} holds the reserved token {found[0]}"
        if any("\ud800" <= character <= "\udfff" for character in text):
            return f"{text!r:.200} is no Unicode text"
    return None


def own_texts(turns: list[str], masks: int) -> list[str]:
    """The texts of a row without what templates put there: the image's tag, and one [SEG] per mask in the answers."""
    texts = [turns[0].removeprefix(f"{IMAGE_TAG}\n")]
    for number, text in enumerate(turns[1:], 1):
        if number % 2:
            masks, text = masks - text.count(SEG), text.replace(SEG, "", masks)
        texts.append(text)
    return texts


class Records(ABC):
    """What `check-data` and the totals ask of training sets and evaluation splits alike."""

    @abstractmethod
    def keys(self) -> np.ndarray:
        """`image_key` of every record on disk, int64 (n,); a split has one per photo."""

    def annotations(self, item: int, image: Image.Image) -> Iterator[Annotation]:
        """The segmentations of one record, where they are polygons or RLE."""
        return iter(())

    def faults(self) -> list[str]:
        """What is wrong with the files of the set as a whole, such as ids that occur twice."""
        return []

    def remarks(self) -> list[str]:
        """What is odd in the files of the set but has a settled meaning; said once when training starts."""
        return []

    def counts(self) -> dict[str, int]:
        """What it holds on disk, to compare with `totals.known_totals`."""
        return {"images": len(np.unique(self.keys()))}


class TrainingSet(Records):
    """Numbered training samples of one data set; a sub-class and its entry in `FAMILIES` are all that it takes.

    Sub-classes set `name` and call `choose`. What else is special about a set are these attributes and methods, which
    have defaults:

    cap:          samples that one pass over the set takes at most; each pass draws its own (see `mixture`)
    segmentation: its samples carry masks
    redrawn:      the mixture "published" draws its samples with replacement
    rated:        the rate of its family multiplies it; otherwise it counts once
    folder:       the folder below dataset_dir by which check-data knows that the set is there; else see `mark`
    everything, annotations, faults, remarks, counts: what check-data looks at
    """

    name: str
    rows: int  # conversations per sample, at most
    items: np.ndarray  # int32 (n,), record numbers
    cap: int | None = None
    folder: str | None = None
    segmentation = True
    redrawn = False
    rated = True

    @abstractmethod
    def __init__(self, dataset_dir: Path, data_dir: Path, *, rows: int, allow_outside: bool = False, **options: Any):
        """Open the set.

        rows:          conversations per sample, at most
        allow_outside: photos may lie outside the folders of the set (see `paths.inside`)
        """

    @classmethod
    @abstractmethod
    def paths(cls, dataset_dir: Path, data_dir: Path) -> list[Path]:
        """Files and folders that must exist before training starts."""

    @classmethod
    def mark(cls, dataset_dir: Path, data_dir: Path) -> Path:
        """The path whose presence says that a user has the set: its folder, or else the first path that it needs."""
        return Path(dataset_dir) / cls.folder if cls.folder else cls.paths(dataset_dir, data_dir)[0]

    @classmethod
    def everything(cls, dataset_dir: Path, data_dir: Path) -> dict[str, Any]:
        """The further arguments with which check-data opens the set, so that it reads all files that are there."""
        return {}

    @property
    def label(self) -> str:
        """The set's name without the folder that it lies in, for the settings of a run."""
        return self.name

    @abstractmethod
    def contents(self) -> Iterable[bytes]:
        """What tells the set's annotations and records from others; the same wherever a copy of them lies."""

    @abstractmethod
    def files(self, item: int) -> list[Path]:
        """The files that one record alone needs, such as its photo. Raises SampleError where it names none."""

    def digest(self) -> str:
        """A short text that is the same for every copy of the set, and another one for other data.

        It is made of `contents`, of which records take part, and of the `files` of DIGESTED of them.
        """
        found = hashlib.sha256(self.items.tobytes())
        for part in self.contents():
            found.update(hashlib.sha256(part).digest())
        for place in np.linspace(0, len(self) - 1, min(DIGESTED, len(self)), dtype=int).tolist():
            try:
                paths = self.files(int(self.items[place]))
            except SampleError:
                continue
            for path in paths:
                if path.is_file():  # it may be missing, or a pipe that nobody writes to
                    with open(path, "rb") as file:
                        found.update(hashlib.sha256(file.read(DIGESTED_BYTES)).digest())
        return found.hexdigest()[:16]

    @abstractmethod
    def read(self, item: int, rng: np.random.Generator) -> Sample | None:
        """The sample of one record; None when it has no usable label. Raises SampleError when it is broken."""

    def draw(self, items: Sequence[T], rng: np.random.Generator) -> list[T]:
        """At most `rows` of the items of one record, without repetition."""
        return [items[i] for i in rng.choice(len(items), min(self.rows, len(items)), replace=False)]

    def choose(self, records: int, source: Path) -> None:
        """Take all records that `source`, a file or folder, holds. Raises ValueError when there are none."""
        if not records:
            raise ValueError(f"{self.name}: no training samples found in {source} (see {DATASETS})")
        self.items = np.arange(records, dtype=np.int32)

    def exclude(self, keys: np.ndarray) -> None:
        """Drop every sample whose photo is among `keys`."""
        self.items = self.items[~np.isin(self.keys()[self.items], keys)]

    def __len__(self) -> int:
        return len(self.items)

    def sample(self, index: int, rng: np.random.Generator) -> Sample:
        """Sample `index` in [0, len); one without usable labels is served by the next that has some, cyclically.

        Raises SampleError when it is broken, which includes a text that holds a control token.
        """
        for step in range(len(self)):
            sample = self.read(int(self.items[(index + step) % len(self)]), rng)
            if sample is not None:
                for turns, masks in zip(sample.conversations, sample.masks):
                    fault = forged(own_texts(turns, len(masks)))
                    if fault:
                        raise SampleError(sample.id, fault)
                return sample
        raise SampleError(self.name, "no image of this set has a usable label")


@dataclass(frozen=True)
class EvalImage:
    """One photo of an evaluation split; a unit is one sentence.

    image_id:    file name (refclef: `file_name` of instances.json)
    sentences:   as read
    is_sentence: whole questions (ReasonSeg), as opposed to phrases
    unit_ids:    unique within the split, stable
    no_target:   nothing in the photo is meant (gRefCOCO)
    lower:       phrases are lower-cased in prompts (referring sets)
    load:        () -> photo (PIL, RGB, oriented), masks uint8 (n, H, W), 255 = ignored; H, W the annotation's size.
                 Raises SampleError
    """

    image_id: str
    sentences: list[str]
    is_sentence: list[bool]
    unit_ids: list[str]
    no_target: list[bool]
    lower: bool
    load: Callable[[], tuple[Image.Image, np.ndarray]]

    @property
    def prompts(self) -> list[str]:
        """The fixed evaluation question of each unit."""
        return [evaluation_prompt(s, long, self.lower) for s, long in zip(self.sentences, self.is_sentence)]


class EvalSplit(Records, Sequence[EvalImage]):
    """The photos of an evaluation split in a fixed order; a sub-class is the `reader` of an entry of SPLITS.

    note: what a reader of its figures must know besides the protocol
    """

    name: str
    note: str = ""

    @abstractmethod
    def __init__(self, name: str, dataset_dir: Path, *, allow_outside: bool = False):
        """Open the split; `allow_outside`: photos may lie outside its folders (see `paths.inside`)."""

    @staticmethod
    @abstractmethod
    def paths(name: str, dataset_dir: Path) -> list[Path]:
        """Files and folders that must exist before the split is read."""

    @abstractmethod
    def read(self, item: int) -> EvalImage:
        """One photo. Raises SampleError when its annotation is broken."""

    def __getitem__(self, item: int) -> EvalImage:  # type: ignore[override]  # a split is never sliced
        """One photo. Raises SampleError when it is broken, which includes a text that holds a control token."""
        if not 0 <= item < len(self):
            raise IndexError(item)
        photo = self.read(item)
        fault = forged(prompt.removeprefix(IMAGE_TAG) for prompt in photo.prompts)
        if fault:
            raise SampleError(f"{self.name}/{photo.image_id}", fault)
        return photo
