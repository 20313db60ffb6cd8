"""Referring expressions: refclef, refcoco, refcoco+, refcocog (umd), grefcoco; a sample is an image.

refer_seg/<set>/{refs(unc).p, refs(umd).p, grefs(unc).json}   expressions
refer_seg/<set>/instances.json                                masks, COCO style
refer_seg/images/{mscoco/images/train2014, saiapr_tc-12}      photos

For evaluation also R-RefCOCO (rrefcoco, rrefcoco+, rrefcocog) and Ref-ZOM (refzom, partition "final", photos in
mscoco/images/trainval2014), where a sentence may mean nothing, as in gRefCOCO.
"""

from pathlib import Path

import numpy as np

from self1e.data.coco import CocoIndex
from self1e.data.readers import read_refs
from self1e.data.samples import PhotoFolder, SampleError
from self1e.data.sets.expressions import Expression, ExpressionData, ExpressionSet, ExpressionSplit
from self1e.data.tables import open_tables
from self1e.errors import UserError

PHOTOS = {"refclef": "saiapr_tc-12", "refzom": "mscoco/images/trainval2014"}  # below refer_seg/images


class ReferringData(ExpressionData):
    """The images of one split of one set, sorted by image id. A target is an annotation id; -1 means nothing.

    dataset_dir: holds `refer_seg`
    name:        refclef, refcoco, refcoco+, refcocog, grefcoco, refzom, or one of R-RefCOCO
    partition:   "unc", "umd", or "final" of Ref-ZOM
    split:       train and val by equality; testA, testB, testC are the splits whose name holds that letter, test those
                 whose name holds "test" (the REFER toolbox's rule); all by equality in grefcoco
    """

    sized = False  # instances.json states sizes of its own

    def __init__(self, dataset_dir: Path, name: str, partition: str, split: str, *, allow_outside: bool = False):
        self.name = name
        self.refs, instances, photos = self.paths(dataset_dir, name, partition)
        self.photos = PhotoFolder(photos, allow_outside)
        tables = open_tables(self.refs, read_refs)
        self.coco = CocoIndex(instances)
        self.problems = self.coco.problems
        self._groups = tables.records("groups")
        parts = [np.arange(a, b) for known, a, b in tables.meta["splits"] if _in_split(known, split, name)]
        groups = np.concatenate([np.zeros(0, np.int64), *parts])
        # An image can belong to several raw splits (testA and testB make up test): one entry, its groups together.
        images = tables.array("group_images")[groups]
        order = np.argsort(images, kind="stable")
        self._order = groups[order]
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

    def image_keys(self) -> np.ndarray:
        return self.coco.image_keys[self.coco.image_numbers(self.image_ids)]

    def references(self, item: int) -> list[tuple[int, list[int], list[tuple[int, str]]]]:
        """(ref id, annotation ids, [(sentence id, sentence), ...]) of each reference of an image."""
        stop = self._starts[item + 1] if item + 1 < len(self) else len(self._order)
        return [ref for group in self._order[self._starts[item] : stop] for ref in self._groups[int(group)][1]]

    def expressions(self, item: int) -> list[Expression]:
        """The sentences as read; the place of one is "<ref id>/<sentence id>"."""
        return [
            Expression(sentence, ids or [-1], f"{ref_id}/{sent_id}", no_target=set(ids) <= {-1})
            for ref_id, ids, sentences in self.references(item)
            for sent_id, sentence in sentences
        ]

    def counts(self) -> dict[str, int]:
        """Images, references and sentences, to compare with the known totals."""
        sentences = [len(texts) for item in range(len(self)) for _, _, texts in self.references(item)]
        return {"images": len(self), "refs": len(sentences), "sentences": sum(sentences)}

    def file_name(self, item: int) -> str:
        """Name of the photo below its folder. Raises SampleError when instances.json lacks the image."""
        return self._image(item)[0]

    def _image(self, item: int) -> tuple[str, int, int]:
        try:
            return self.coco.image(int(self.coco.image_numbers(self.image_ids[item : item + 1])[0]))
        except UserError as error:
            raise SampleError(f"{self.name}/{self.image_ids[item]}", str(error)) from error

    def mask(self, item: int, target: int, id: str) -> np.ndarray:
        _, height, width = self._image(item)
        if target == -1:
            return np.zeros((height, width), np.uint8)
        try:
            annotation = self.coco.annotation(target)
        except UserError as error:
            raise SampleError(id, str(error)) from error
        return self.coco.mask(annotation, height, width, id)


def _in_split(known: str, split: str, name: str) -> bool:
    if name == "grefcoco" or split in ("train", "val"):
        return known == split
    if split == "test":
        return "test" in known
    return split.removeprefix("test") in known


class ReferringTrain(ExpressionSet):
    """Training images of one set; sub-classes name it."""

    data: ReferringData
    partition = "unc"

    def __init__(self, dataset_dir: Path, data_dir: Path, *, conversations: int, allow_outside: bool = False):
        data = ReferringData(dataset_dir, self.name, self.partition, "train", allow_outside=allow_outside)
        super().__init__(data, conversations=conversations)

    @classmethod
    def paths(cls, dataset_dir: Path, data_dir: Path) -> list[Path]:
        return list(ReferringData.paths(dataset_dir, cls.name, cls.partition))


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


class ReferringSplit(ExpressionSplit):
    """An evaluation split; `name` is "<set>|<partition>|<split>"."""

    def __init__(self, name: str, dataset_dir: Path, *, allow_outside: bool = False):
        super().__init__(name, ReferringData(dataset_dir, *name.split("|"), allow_outside=allow_outside))

    @staticmethod
    def paths(name: str, dataset_dir: Path) -> list[Path]:
        return list(ReferringData.paths(dataset_dir, *name.split("|")[:2]))
