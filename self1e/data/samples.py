"""What a data set yields, and the two interfaces of this package.

A `TrainingSet` holds numbered samples, an `EvalSplit` is a sequence of `EvalImage`, each one photo with its sentences
and masks. Everything downstream (mixture, processor, evaluation) knows only these.
"""

import hashlib
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import numpy as np
from PIL import Image

from self1e.data.paths import inside
from self1e.errors import UserError
from self1e.model.photos import read_picture
from self1e.model.prompts import IMAGE_TAG, SEG, evaluation_prompt, reserved_in

T = TypeVar("T")
COCO_NAME = re.compile(r"(?:COCO_(?:train|val)2014_)?(\d{12})\.(?:jpg|png)")


class SampleError(UserError):
    """A sample that cannot be built: its photo or annotation is broken. `id` names the sample, `cause` says why."""

    def __init__(self, id: str, cause: str):
        super().__init__(id, cause)
        self.id, self.cause = id, cause

    def __str__(self) -> str:
        return f"{self.id}: {self.cause}"


@dataclass
class Sample:
    """One image with its conversations.

    id:            "<set>/<image file or record number>", printed in logs
    image:         RGB, EXIF orientation applied
    conversations: each one user, assistant, user, ...; the first user turn starts with "<image>\\n"
    masks:         of each conversation, uint8 {0, 1} (n_seg, H, W) at the annotation's size; n_seg = "[SEG]" in it
    replaced:      (id, cause) of the broken samples that this one replaces
    """

    id: str
    image: Image.Image
    conversations: list[list[str]]
    masks: list[np.ndarray]
    replaced: tuple[tuple[str, str], ...] = ()


# --------------------------------------------------------------------------------------------------------- photos


def load_oriented(path: Path | str | BinaryIO, id: str | None = None) -> tuple[Image.Image, int]:
    """The photo in RGB, EXIF orientation applied, and the orientation tag it had (1 to 8, 1 = stored upright).

    Raises SampleError, under `id` or the path, when the file is missing, truncated or no image.
    """
    try:
        return read_picture(path)
    except OSError as error:
        raise SampleError(id or str(path), f"cannot read {path}: {error.strerror or error}") from error


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
        except UserError as error:
            raise SampleError(id, str(error)) from error


def image_key(name: str) -> int:
    """A 64-bit key under which one photo is found in several sets: COCO's number, else a (negative) hash of the name.

    COCO photos go by different names in different sets (`COCO_train2014_000000000009.jpg`, `000000000009.png`); all
    others have the same name wherever they appear.
    """
    coco = COCO_NAME.fullmatch(name.rsplit("/", 1)[-1])
    if coco:
        return int(coco[1])
    return -1 - int.from_bytes(hashlib.blake2b(name.encode(), digest_size=7).digest(), "big")


def image_keys(names: Iterable[str]) -> np.ndarray:
    """`image_key` of each name, int64 (n,)."""
    return np.fromiter((image_key(name) for name in names), np.int64)


# ---------------------------------------------------------------------------------------------------------- texts


def check_texts(id: str, texts: Iterable[str]) -> None:
    """Raise SampleError under `id` where a text holds a control token, such as [SEG], or is no Unicode text."""
    for text in texts:
        if found := reserved_in(text):
            raise SampleError(id, f"{text!r:.200} holds the reserved token {found[0]}")
        if any("\ud800" <= character <= "\udfff" for character in text):
            raise SampleError(id, f"{text!r:.200} is no Unicode text")


def check_sample(sample: Sample) -> None:
    """`check_texts` of a sample's conversations, without the image's tag and the [SEG] that templates put there."""
    for turns, masks in zip(sample.conversations, sample.masks, strict=True):
        left, texts = len(masks), [turns[0].removeprefix(f"{IMAGE_TAG}\n")]
        for number, text in enumerate(turns[1:], 1):
            if number % 2:
                left, text = left - text.count(SEG), text.replace(SEG, "", left)
            texts.append(text)
        check_texts(sample.id, texts)


def draw(items: Sequence[T], count: int, rng: np.random.Generator) -> list[T]:
    """At most `count` of the items, without repetition, in random order."""
    return [items[i] for i in rng.choice(len(items), min(count, len(items)), replace=False)]


# ----------------------------------------------------------------------------------------------------- interfaces


class TrainingSet(ABC):
    """Numbered training samples of one data set; a sub-class and its entry in `families.FAMILIES` are all it takes.

    name:         how users and logs call it
    cap:          samples that one pass over the set takes at most; each pass draws its own (see `mixture`)
    segmentation: its samples carry masks
    redrawn:      the mixture "published" draws its samples with replacement
    problems:     what is wrong with the set's files as a whole; said when training starts, and by check-data
    """

    name: str
    cap: int | None = None
    segmentation = True
    redrawn = False
    problems: Sequence[str] = ()

    @abstractmethod
    def __init__(self, dataset_dir: Path, data_dir: Path, *, conversations: int, **options: Any):
        """Open the set.

        conversations: of a sample, at most
        options:       `allow_outside`, photos may lie outside the folders of the set (see `paths.inside`), and what
                       the set's family passes
        """

    @classmethod
    @abstractmethod
    def paths(cls, dataset_dir: Path, data_dir: Path) -> list[Path]:
        """Files and folders that must exist before training starts; the first is the set's own."""

    @abstractmethod
    def __len__(self) -> int:
        """Number of records on disk."""

    @abstractmethod
    def image_keys(self) -> np.ndarray:
        """`image_key` of every record's photo, int64 (len,)."""

    @abstractmethod
    def read(self, index: int, rng: np.random.Generator) -> Sample | None:
        """The sample of record `index` in [0, len), whose random choices come from `rng` alone.

        None when it has no usable label: the next record serves in its place. Raises SampleError when it is broken.
        """


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
    """The photos of an evaluation split in a fixed order; a sub-class is the `reader` of an entry of `splits.SPLITS`.

    note:     what a reader of its figures must know besides the protocol
    problems: what is wrong with its files as a whole; said by check-data
    """

    name: str
    note: str = ""
    problems: Sequence[str] = ()

    @abstractmethod
    def __init__(self, name: str, dataset_dir: Path, *, allow_outside: bool = False):
        """Open the split; `allow_outside`: photos may lie outside its folders (see `paths.inside`)."""

    @staticmethod
    @abstractmethod
    def paths(name: str, dataset_dir: Path) -> list[Path]:
        """Files and folders that must exist before the split is read."""

    @abstractmethod
    def image_keys(self) -> np.ndarray:
        """`image_key` of every photo, int64 (len,)."""

    @abstractmethod
    def read(self, item: int) -> EvalImage:
        """One photo. Raises SampleError when its annotation is broken."""

    def __getitem__(self, item: int) -> EvalImage:  # type: ignore[override]  # a split is never sliced
        """One photo. Raises SampleError when it is broken, which includes a text that holds a control token."""
        if not 0 <= item < len(self):
            raise IndexError(item)
        photo = self.read(item)
        check_texts(f"{self.name}/{photo.image_id}", (prompt.removeprefix(IMAGE_TAG) for prompt in photo.prompts))
        return photo
