"""Referring expressions: refclef, refcoco, refcoco+, refcocog (umd), grefcoco; a sample is an image.

refer_seg/<set>/{refs(unc).p, refs(umd).p, grefs(unc).json}   expressions
refer_seg/<set>/instances.json                                masks, COCO style
refer_seg/images/{mscoco/images/train2014, saiapr_tc-12}      photos

For evaluation also R-RefCOCO (rrefcoco, rrefcoco+, rrefcocog) and Ref-ZOM (refzom, partition "final", photos in
mscoco/images/trainval2014), where a sentence may mean nothing, as in gRefCOCO.
"""

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from self1e.data.coco import CocoIndex
from self1e.data.index import open_index
from self1e.data.masks import annotation_mask, decode_each, orient
from self1e.data.readers import read_refs
from self1e.data.sample import (
    Annotation,
    EvalImage,
    EvalSplit,
    PhotoFolder,
    Sample,
    SampleError,
    SharedRecords,
    TrainingSet,
)
from self1e.model import prompts

PHOTOS = {"refclef": "saiapr_tc-12", "refzom": "mscoco/images/trainval2014"}  # below refer_seg/images


class ReferringData:
    """The images of one split of one set, sorted by image id.

    dataset_dir: holds `refer_seg`
    name:        refclef, refcoco, refcoco+, refcocog, grefcoco, refzom, or one of R-RefCOCO
    partition:   "unc", "umd", or "final" of Ref-ZOM
    split:       train and val by equality; testA, testB, testC are the splits whose name holds that letter, test those
                 whose name holds "test" (the REFER toolbox's rule); all by equality in grefcoco
    """

    def __init__(self, dataset_dir: Path, name: str, partition: str, split: str, *, allow_outside: bool = False):
        self.name = name
        self.refs, instances, photos = self.paths(dataset_dir, name, partition)
        self.photos = PhotoFolder(photos, allow_outside)
        index = open_index(self.refs, read_refs)
        self.coco = CocoIndex(instances)
        self._groups = index.table("groups")
        parts = [np.arange(a, b) for known, a, b in index.meta["splits"] if _in_split(known, split, name)]
        rows = np.concatenate(parts) if parts else np.zeros(0, np.int64)
        # An image can belong to several raw splits (testA and testB make up test): one entry, its groups together.
        images = index.array("group_images")[rows]
        order = np.argsort(images, kind="stable")
        self._rows = rows[order]
        self.image_ids, self._starts = np.unique(images[order], return_index=True)

    @staticmethod
    def paths(dataset_dir: Path, name: str, partition: str) -> tuple[Path, Path, Path]:
        """(expressions, instances, photos)."""
        root = Path(dataset_dir) / "refer_seg"
        refs = f"grefs({partition}).json" if name == "grefcoco" else f"refs({partition}).p"
        photos = PHOTOS.get(name, "mscoco/images/train2014")
        return root / name / refs, root / name / "instances.json", root / "images" / photos

    def __len__(self) -> int:
        return len(self.image_ids)

    def keys(self) -> np.ndarray:
        """`image_key` of each image."""
        try:
            return self.coco.image_keys[self.coco.image_rows(self.image_ids)]
        except KeyError as error:
            raise ValueError(f"{self.coco.path} has no {error}, which {self.refs.name} names") from error

    def expressions(self, item: int) -> list[tuple[str, list[int], str]]:
        """(sentence as read, annotation ids, "<ref id>/<sentence id>") of every expression of an image."""
        stop = self._starts[item + 1] if item + 1 < len(self) else len(self._rows)
        return [
            (sentence, annotation_ids, f"{ref_id}/{sent_id}")
            for row in self._rows[self._starts[item] : stop]
            for ref_id, annotation_ids, sentences in self._groups[int(row)][1]
            for sent_id, sentence in sentences
        ]

    def counts(self) -> dict[str, int]:
        """Images, expressions and sentences."""
        groups = [self._groups[int(row)][1] for row in self._rows]
        sentences = sum(len(texts) for group in groups for _, _, texts in group)
        return {"images": len(self), "refs": sum(map(len, groups)), "sentences": sentences}

    def file_name(self, item: int) -> str:
        """Name of the photo below its folder. Raises SampleError when instances.json lacks the image."""
        return self._image(item)[0]

    def _image(self, item: int) -> tuple[str, int, int]:
        try:
            return self.coco.image(int(self.coco.image_rows(self.image_ids[item : item + 1])[0]))
        except KeyError as error:
            raise SampleError(f"{self.name}/{self.image_ids[item]}", f"{self.coco.path} has no {error}") from error

    def annotations(self, item: int) -> Iterator[Annotation]:
        """The annotations that an image's expressions name."""
        wanted = sorted({id for _, ids, _ in self.expressions(item) for id in ids} - {-1})
        row = int(self.coco.image_rows(self.image_ids[item : item + 1])[0])
        return self.coco.placed(row, map(self.coco.annotation, wanted))

    def remarks(self) -> list[str]:
        """What is odd in the annotations but has a settled meaning."""
        return self.coco.remarks(empty="are empty masks")

    def load(self, item: int, targets: list[list[int]]) -> tuple[Image.Image, np.ndarray]:
        """Photo, and for each list of annotation ids the union of their masks (n, H, W); -1 adds nothing."""
        file_name, height, width = self._image(item)
        id = f"{self.name}/{file_name}"
        image, orientation = self.photos.load(file_name, id)

        def decode(annotation_id: int) -> np.ndarray:
            try:
                annotation = self.coco.annotation(annotation_id)
            except KeyError as error:
                raise SampleError(id, f"{self.coco.path} has no {error}") from error
            return annotation_mask(annotation, height, width, id)

        decoded = decode_each(sorted({a for ids in targets for a in ids} - {-1}), decode, id)
        empty = np.zeros((height, width), np.uint8)
        masks = [
            orient(np.bitwise_or.reduce([empty, *(decoded[a] for a in ids if a != -1)]), image, orientation)
            for ids in targets
        ]
        return image, np.stack(masks) if masks else np.zeros((0, height, width), np.uint8)


def _in_split(known: str, split: str, name: str) -> bool:
    if name == "grefcoco" or split in ("train", "val"):
        return known == split
    if split == "test":
        return "test" in known
    return split.removeprefix("test") in known


class ReferringTrain(SharedRecords, TrainingSet):
    """Training images of one set; sub-classes name it."""

    partition = "unc"

    def __init__(self, dataset_dir: Path, data_dir: Path, *, rows: int, allow_outside: bool = False):
        self.data = ReferringData(dataset_dir, self.name, self.partition, "train", allow_outside=allow_outside)
        self.rows = rows
        self.choose(len(self.data), self.paths(dataset_dir, data_dir)[0])

    @classmethod
    def mark(cls, dataset_dir: Path, data_dir: Path) -> Path:
        return Path(dataset_dir) / "refer_seg" / cls.name

    @classmethod
    def paths(cls, dataset_dir: Path, data_dir: Path) -> list[Path]:
        return list(ReferringData.paths(dataset_dir, cls.name, cls.partition))

    def faults(self) -> list[str]:
        return self.data.coco.faults()

    def counts(self) -> dict[str, int]:
        return self.data.counts()

    def read(self, item: int, rng: np.random.Generator) -> Sample | None:
        expressions = self.data.expressions(item)
        if not expressions:
            return None
        drawn = rng.choice(len(expressions), min(self.rows, len(expressions)), replace=False)
        chosen = [expressions[i] for i in drawn]
        texts = [sentence.strip() for sentence, _, _ in chosen]
        conversations = [[prompts.question(text, rng, is_sentence=False), prompts.answer(rng)] for text in texts]
        image, masks = self.data.load(item, [ids for _, ids, _ in chosen])
        return Sample(f"{self.name}/{self.data.file_name(item)}", image, conversations, list(masks[:, None]))


class RefCLEF(ReferringTrain):
    name = "refclef"


class RefCOCO(ReferringTrain):
    name = "refcoco"


class RefCOCOPlus(ReferringTrain):
    name = "refcoco+"


class RefCOCOg(ReferringTrain):
    name = "refcocog"
    partition = "umd"


class GRefCOCO(ReferringTrain):
    name = "grefcoco"


class ReferringSplit(SharedRecords, EvalSplit):
    """An evaluation split; `name` is "<set>|<partition>|<split>"."""

    def __init__(self, name: str, dataset_dir: Path, *, allow_outside: bool = False):
        self.name = name
        self.data = ReferringData(dataset_dir, *name.split("|"), allow_outside=allow_outside)

    @staticmethod
    def paths(name: str, dataset_dir: Path) -> list[Path]:
        return list(ReferringData.paths(dataset_dir, *name.split("|")[:2]))

    def __len__(self) -> int:
        return len(self.data)

    def counts(self) -> dict[str, int]:
        return self.data.counts()

    def read(self, item: int) -> EvalImage:
        expressions = self.data.expressions(item)
        n = len(expressions)
        file_name = self.data.file_name(item)
        return EvalImage(
            image_id=file_name,
            sentences=[sentence for sentence, _, _ in expressions],
            is_sentence=[False] * n,
            unit_ids=unique([f"{file_name}/{place}" for _, _, place in expressions]),
            no_target=[set(ids) <= {-1} for _, ids, _ in expressions],
            lower=True,
            load=partial(self.data.load, item, [ids for _, ids, _ in expressions]),
        )


def unique(ids: list[str]) -> list[str]:
    """The ids; a repeated one gets its number appended."""
    return [f"{id}#{ids[:k].count(id)}" if id in ids[:k] else id for k, id in enumerate(ids)]
