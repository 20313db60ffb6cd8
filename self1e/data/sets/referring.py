"""Referring expressions: refclef, refcoco, refcoco+, refcocog (umd), grefcoco; a sample is an image.

refer_seg/<set>/{refs(unc).p, refs(umd).p, grefs(unc).json}   expressions
refer_seg/<set>/instances.json                                masks, COCO style
refer_seg/images/{mscoco/images/train2014, saiapr_tc-12}      photos
"""

from pathlib import Path

import numpy as np
from PIL import Image

from self1e.data.masks import decode_segmentation
from self1e.data.readers import Records, fields, load_plain_pickle, open_tables, read_coco, stream_json
from self1e.data.samples import DATASETS
from self1e.data.sets.expressions import Expression, ExpressionSet
from self1e.errors import UserError


def read_refs(path: Path) -> Records:
    """Referring expressions, `refs(*).p` or `grefs(*).json`, sorted by split and image.

    Tables `refs` [ref_id, [ann ids], [[sent_id, sentence], ...]] with the id of the image and the number of the split
    as keys, and `splits`, names.
    """
    given = [ref for _, ref in stream_json(path)] if path.suffix == ".json" else load_plain_pickle(path)
    refs: list[tuple[str, int, list]] = []
    for number, ref in enumerate(given):
        location = f"record {number} counted from 0"
        split, image_id, ref_id = fields(ref, location, split=str, image_id=int, ref_id=int)
        ids, found = fields(ref, location, ann_id=(int, list, tuple), sentences=(list, tuple))
        sentences = [fields(each, location, sent_id=int, sent=str) for each in found]
        refs.append((split, image_id, [ref_id, [ids] if isinstance(ids, int) else list(ids), sentences]))
    if not refs:
        raise UserError(f"it holds no list of references; is this the right file? See {DATASETS}")
    splits = sorted({split for split, *_ in refs})
    for split, image_id, record in sorted(refs, key=lambda ref: ref[:2]):
        yield "refs", record, image_id, splits.index(split)
    yield from (("splits", split) for split in splits)


class Referring(ExpressionSet):
    """The images of one split, sorted by image id; "refcoco" is "refcoco|unc|train", "refcocog" "refcocog|umd|train".

    train and val are found by equality; testA, testB, testC are the splits whose name holds that letter, test those
    whose name holds "test" (the REFER toolbox's rule); all by equality in grefcoco. A target is an annotation id; -1
    means nothing.
    """

    sized = False  # instances.json states sizes of its own

    def paths(self) -> list[Path]:
        """Expressions, instances, photos."""
        name, partition, _ = _parts(self.name)
        root = self.dataset_dir / "refer_seg"
        refs = f"grefs({partition}).json" if name == "grefcoco" else f"refs({partition}).p"
        photos = "saiapr_tc-12" if name == "refclef" else "mscoco/images/train2014"
        return [root / name / refs, root / name / "instances.json", root / "images" / photos]

    def open(self, refs: Path, instances: Path, photos: Path) -> None:
        self.name, _, split = _parts(self.name)
        coco, tables = open_tables(instances, read_coco), open_tables(refs, read_refs)
        self.folder, self.problems = photos, list(coco["problems"])
        self._images, self._annotations, self._refs = coco["images"], coco["annotations"], tables["refs"]
        splits = [number for number, known in enumerate(tables["splits"]) if _in_split(known, split, self.name)]
        self._numbers = np.flatnonzero(np.isin(self._refs.keys[:, 1], splits))
        self._owners = self._refs.keys[self._numbers, 0]
        self._ids = np.unique(self._owners)  # an image can be in several raw splits, as testA and testB make up test
        if len(unknown := np.setdiff1d(self._ids, self._images.keys[:, 0])):
            raise UserError(f"{instances} has no image id {unknown[0]}")

    def __len__(self) -> int:
        return len(self._ids)

    def expressions(self, index: int) -> list[Expression]:
        return [
            Expression(sentence, ids or [-1], f"/{ref_id}/{sent_id}", no_target=set(ids) <= {-1})
            for number in self._numbers[self._owners == self._ids[index]]
            for ref_id, ids, sentences in [self._refs[number]]
            for sent_id, sentence in sentences
        ]

    def _image(self, index: int) -> list:
        return self._images.having(self._ids[index])[0]

    def file_name(self, index: int) -> str:
        return self._image(index)[0]

    def mask(self, index: int, target: int, image: Image.Image) -> np.ndarray:
        _, height, width = self._image(index)
        if target == -1:
            return np.zeros((height, width), np.uint8)
        if not (found := self._annotations.having(target)):
            raise UserError("instances.json does not hold it")
        return decode_segmentation(found[0][2], height, width)


def _parts(name: str) -> tuple[str, str, str]:
    """Set, partition and split."""
    name, *rest = name.split("|")
    partition, split = rest or ("umd" if name == "refcocog" else "unc", "train")
    return name, partition, split


def _in_split(known: str, split: str, name: str) -> bool:
    if name == "grefcoco" or split in ("train", "val"):
        return known == split
    return (split if split == "test" else split.removeprefix("test")) in known
