"""Evaluation splits: who reads one, how it is scored, and the published figures.

    for image in load_split("refcoco|unc|val", "dataset"): photo, masks = image.load()

To add a split, add one entry to SPLITS. Published figures are percentages of the SELF1E paper (arXiv 2603.19026): `2B`
and `8B` were trained on the base mixture, `SEG-2B` and `SEG-8B` on the segmentation mixture.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from self1e.data.samples import missing
from self1e.data.sets.custom import Custom
from self1e.data.sets.expressions import ExpressionSet
from self1e.data.sets.parquet import ParquetSplit
from self1e.data.sets.reasoning import ReasonSeg
from self1e.data.sets.referring import Referring
from self1e.errors import check_known

MODELS = ("2B", "SEG-2B", "8B", "SEG-8B")


@dataclass(frozen=True, kw_only=True)
class SplitEntry:
    """One split, or one kind of splits."""

    reader: type[ExpressionSet]
    protocol: str = "lisa"  # how it is scored, a key of `metrics.PROTOCOLS`
    headline: tuple[str, ...] = ("ciou",)  # the figures that the paper reports, keys of the result
    published: Mapping[str, tuple[float, ...]] = field(default_factory=dict)  # model -> a percentage for each headline
    default: bool = True  # covered by an evaluation of all splits


REASONING = partial(SplitEntry, reader=ReasonSeg, protocol="reasonseg", headline=("giou", "ciou"))


def _referring(*ciou: float, **fields: Any) -> SplitEntry:
    return SplitEntry(reader=Referring, published={model: (value,) for model, value in zip(MODELS, ciou)}, **fields)


SPLITS: dict[str, SplitEntry] = {
    "ReasonSeg|val": REASONING(published={"2B": (59.4, 68.8), "8B": (65.9, 69.7)}),
    "ReasonSeg|test": REASONING(published={"2B": (57.3, 57.6), "8B": (65.7, 67.0)}),
    "refcoco|unc|val": _referring(80.2, 84.3, 82.5, 84.7),
    "refcoco|unc|testA": _referring(82.1, 85.4, 83.8, 86.2),
    "refcoco|unc|testB": _referring(77.6, 82.3, 80.1, 83.4),
    "refcoco+|unc|val": _referring(74.6, 78.9, 77.6, 80.2),
    "refcoco+|unc|testA": _referring(79.1, 83.5, 81.6, 84.2),
    "refcoco+|unc|testB": _referring(69.2, 75.1, 73.7, 77.0),
    "refcocog|umd|val": _referring(77.0, 80.4, 79.1, 82.1),
    "refcocog|umd|test": _referring(77.8, 81.0, 79.8, 82.8),
    **{f"grefcoco|unc|{split}": _referring(protocol="rela") for split in ("val", "testA", "testB")},
    **{f"refclef|unc|{split}": _referring(default=False) for split in ("val", "test")},
}

PREFIXES: dict[str, SplitEntry] = {  # of names that go on with a path: "custom|own/val.csv", "parquet|own/shards|val"
    "custom": SplitEntry(reader=Custom, default=False),
    "parquet": SplitEntry(reader=ParquetSplit, default=False),
}

DEFAULT_SPLITS: tuple[str, ...] = tuple(name for name, entry in SPLITS.items() if entry.default)


def get_splits(names: Iterable[str]) -> dict[str, SplitEntry]:
    """The entries of `names`, in that order. Raises UserError listing every unknown name and the known ones."""
    kinds = {name: name.partition("|")[0] for name in names}
    known = [*SPLITS, *(f"{kind}|<path>" for kind in PREFIXES)]
    check_known("unknown evaluation split", [name for name, kind in kinds.items() if kind not in PREFIXES], known)
    return {name: PREFIXES.get(kind) or SPLITS[name] for name, kind in kinds.items()}


def split_readers(names: Iterable[str], dataset_dir: str | Path, **flags: Any) -> dict[str, ExpressionSet]:
    """What reads each of the splits, not opened yet; flags: of `TrainingSet`."""
    return {name: entry.reader(name, dataset_dir, **flags) for name, entry in get_splits(names).items()}


def load_split(name: str, dataset_dir: str | Path, **flags: Any) -> ExpressionSet:
    """The photos of an evaluation split, sorted. Raises UserError."""
    return split_readers([name], dataset_dir, **flags)[name].opened()


def evaluation_keys(dataset_dir: str | Path) -> np.ndarray:
    """`image_key` of every photo of the evaluation splits that are on disk."""
    there = [split.opened() for split in split_readers(SPLITS, dataset_dir).values() if not missing(split)]
    return np.concatenate([np.zeros(0, np.int64), *(split.image_keys() for split in there)])
