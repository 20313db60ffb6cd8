"""From selected sets to batches: `make_loader(Stream(build_mixture(select(...), ...), processor, ...), plan)`."""

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from self1e import distributed
from self1e.data.families import Selection, paths_of
from self1e.data.mixture import Mixture
from self1e.data.paths import missing, require_paths
from self1e.data.samples import Sample, naming
from self1e.data.splits import SPLITS, load_split, split_paths
from self1e.errors import UserError

log = logging.getLogger(__name__)


def build_mixture(selection: Selection, **options: Any) -> Mixture:
    """The training mixture of the selected sets; options: of `Mixture`.

    Raises UserError for bad arguments or schemas, and one that names every missing path.
    """
    require_paths(paths_of(selection))
    groups = []
    for family, rate in selection:
        sets = [data.opened() for data in family]
        if empty := [data.name for data in sets if not len(data)]:
            raise UserError(f"{empty[0]}: no training samples in its files")
        for problem in dict.fromkeys(problem for data in sets for problem in data.problems):
            log.warning("%s", problem)
        traits = [(data.rated, data.segmentation, data.redrawn) for data in sets]
        for kind in sorted(set(traits), reverse=True):
            members = [data for data, its in zip(sets, traits) if its == kind]
            groups.append((members, rate if kind[0] else 1))
    return Mixture(groups, **options)


def evaluation_keys(dataset_dir: str | Path) -> np.ndarray:
    """`image_key` of every photo of the evaluation splits that are on disk."""
    there = [name for name in SPLITS if not missing(split_paths([name], dataset_dir))]
    return np.concatenate([np.zeros(0, np.int64), *(load_split(name, dataset_dir).image_keys() for name in there)])


@dataclass
class Stream(Dataset):
    """The encoded samples of a mixture by their slots; one that does not fit the limits counts as broken."""

    mixture: Mixture
    processor: Any
    max_length: int  # tokens of a conversation
    max_tiles: int  # of a photo
    groups: int = 2  # of conversations of similar length in a batch, at most

    def __getitem__(self, slot: Iterable[int]) -> dict:
        return self.mixture.build(slot, self.encode)

    def encode(self, sample: Sample) -> dict:
        limits = {"max_length": self.max_length, "max_tiles": self.max_tiles}
        with naming(sample.id):
            encoded = self.processor.encode(sample.image, sample.conversations, sample.masks, **limits)
        return encoded | {"id": sample.id, "replaced": sample.replaced}

    def collate(self, encoded: list[dict]) -> dict:
        """Join encoded samples to a batch that also names its samples and the broken ones that they replace."""
        ids, replaced = [entry["id"] for entry in encoded], [pair for entry in encoded for pair in entry["replaced"]]
        return dict(self.processor.collate(encoded, groups=self.groups)) | {"ids": ids, "replaced": replaced}


def make_loader(stream: Stream, plan: Sequence[Any], *, workers: int = 0, timeout: float = 0) -> DataLoader:
    """The batches of planned micro-batches: what `processor.collate` makes, with `ids` and `replaced`.

    plan:    of `Mixture.micro_batches`
    workers: processes that read and encode; 0: this one does
    timeout: seconds after which a worker that gives nothing is an error; 0: never
    """
    return DataLoader(
        stream,
        batch_sampler=plan,
        collate_fn=stream.collate,
        num_workers=workers,
        timeout=timeout if workers else 0,
        pin_memory=torch.cuda.is_available(),
        worker_init_fn=distributed.ignore_signals,
        generator=torch.Generator(),  # workers' seeds come from here and not from the training's own stream
    )
