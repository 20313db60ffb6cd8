"""Referring expressions: refclef, refcoco, refcoco+, refcocog (umd), grefcoco; a sample is an image.

refer_seg/<set>/{refs(unc).p, refs(umd).p, grefs(unc).json}   expressions
refer_seg/<set>/instances.json                                masks, COCO style
refer_seg/images/{mscoco/images/train2014, saiapr_tc-12}      photos
"""

from collections import defaultdict
from pathlib import Path

import numpy as np
from PIL import Image

from self1e.data.masks import decode_segmentation
from self1e.data.readers import CocoIndex, read_refs
from self1e.data.sets.expressions import Expression, ExpressionSet
from self1e.data.tables import open_tables


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
        self.folder, self.coco = photos, CocoIndex(instances)
        self.problems = self.coco.problems
        tables = open_tables(refs, read_refs)
        self._records = tables["groups"]
        # An image can belong to several raw splits (testA and testB make up test): one entry, its groups together.
        groups: dict[int, list[int]] = defaultdict(list)
        for number, (known, image) in enumerate(tables["keys"][0]):
            if _in_split(known, split, self.name):
                groups[image].append(number)
        self._groups = [groups[image] for image in sorted(groups)]
        self._images = self.coco.image_numbers(sorted(groups))

    def __len__(self) -> int:
        return len(self._groups)

    def expressions(self, index: int) -> list[Expression]:
        return [
            Expression(sentence, ids or [-1], f"/{ref_id}/{sent_id}", no_target=set(ids) <= {-1})
            for group in self._groups[index]
            for ref_id, ids, sentences in self._records[group]
            for sent_id, sentence in sentences
        ]

    def counts(self) -> dict[str, int]:
        """Images, references and sentences, to compare with the known totals."""
        sentences = [len(texts) for groups in self._groups for group in groups for *_, texts in self._records[group]]
        return {"images": len(self), "refs": len(sentences), "sentences": sum(sentences)}

    def file_name(self, index: int) -> str:
        return self.coco.image(self._images[index])[0]

    def mask(self, index: int, target: int, image: Image.Image) -> np.ndarray:
        _, height, width = self.coco.image(self._images[index])
        segmentation = self.coco.annotation(target)["segmentation"] if target != -1 else []
        return decode_segmentation(segmentation, height, width, self.where(target))


def _parts(name: str) -> tuple[str, str, str]:
    """Set, partition and split."""
    name, *rest = name.split("|")
    partition, split = rest or ("umd" if name == "refcocog" else "unc", "train")
    return name, partition, split


def _in_split(known: str, split: str, name: str) -> bool:
    if name == "grefcoco" or split in ("train", "val"):
        return known == split
    return (split if split == "test" else split.removeprefix("test")) in known
