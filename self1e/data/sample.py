"""What a data set yields, and the two small interfaces of this package.

A `TrainingSet` holds numbered samples, each a pure function of (item, generator). An `EvalSplit` is a sequence of
`EvalImage`, each one photo with its sentences and masks. Everything downstream (mixture, processor, evaluator) knows
only these.
"""

import hashlib
import re
import struct
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image

from self1e.data.paths import README
from self1e.model.processing import as_rgb
from self1e.model.prompts import evaluation_prompt

ORIENTATION_TAG = 0x0112
COCO_NAME = re.compile(r"(?:COCO_(?:train|val)2014_)?(\d{12})\.(?:jpg|png)")
# Everything Pillow is known to raise for files that are missing, truncated, or not what their name says.
UNREADABLE = (OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error, Image.DecompressionBombError)


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


def load_oriented(path: Path | str | BinaryIO, id: str | None = None) -> tuple[Image.Image, int]:
    """The photo in RGB, EXIF orientation applied, and the orientation tag it had (1 to 8, 1 = stored upright).

    Raises SampleError, under `id` or the path, when the file is missing, truncated or no image.
    """
    try:
        with Image.open(path) as image:
            orientation = image.getexif().get(ORIENTATION_TAG, 1)
            image = as_rgb(image)
    except UNREADABLE as error:
        raise SampleError(id or str(path), f"cannot read {path}: {error}") from error
    return image, orientation if orientation in range(1, 9) else 1


def load_image(path: Path | str | BinaryIO, id: str | None = None) -> Image.Image:
    """The photo in RGB, EXIF orientation applied. Raises SampleError (see `load_oriented`)."""
    return load_oriented(path, id)[0]


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


class TrainingSet(ABC):
    """Numbered training samples. Sub-classes set `name` and `items` (which of the records on disk take part)."""

    name: str
    items: np.ndarray  # int32 (n,), record numbers
    cap: int | None = None  # published limit of the set's size

    @classmethod
    @abstractmethod
    def paths(cls, dataset_dir: Path, data_dir: Path) -> list[Path]:
        """Files and folders that must exist before training starts."""

    @abstractmethod
    def read(self, item: int, rng: np.random.Generator) -> Sample | None:
        """The sample of one record; None when it has no usable label. Raises SampleError when it is broken."""

    @abstractmethod
    def keys(self) -> np.ndarray:
        """`image_key` of every record on disk (not only of `items`), int64."""

    def choose(self, records: int, seed: int) -> None:
        """Takes all records, or a random `cap` of them that depends on `seed` alone."""
        if not records:
            raise ValueError(f"{self.name}: no training samples found (see {README})")
        self.items = np.arange(records, dtype=np.int32)
        if self.cap is not None and records > self.cap:
            self.items = np.sort(np.random.default_rng([seed, self.cap]).choice(self.items, self.cap, replace=False))

    def exclude(self, keys: np.ndarray) -> None:
        """Drops every sample whose photo is among `keys`."""
        self.items = self.items[~np.isin(self.keys()[self.items], keys)]

    def __len__(self) -> int:
        return len(self.items)

    def sample(self, index: int, rng: np.random.Generator) -> Sample:
        """Sample `index` in [0, len); one without usable labels is served by the next that has some, cyclically."""
        for step in range(len(self)):
            sample = self.read(int(self.items[(index + step) % len(self)]), rng)
            if sample is not None:
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


class EvalSplit(ABC, Sequence[EvalImage]):
    """The photos of an evaluation split in a fixed order, by name."""

    name: str

    @abstractmethod
    def __init__(self, name: str, dataset_dir: Path): ...

    @staticmethod
    @abstractmethod
    def paths(name: str, dataset_dir: Path) -> list[Path]:
        """Files and folders that must exist before the split is read."""

    @abstractmethod
    def keys(self) -> np.ndarray:
        """`image_key` of each photo, int64 (n,)."""
