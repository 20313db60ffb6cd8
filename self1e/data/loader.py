"""From the flags of a run to its batches, `make_loader(build_mixture(config, ...), Encode(processor, ...), ...)`."""

import logging
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from self1e import distributed
from self1e.data.families import DataConfig
from self1e.data.mixture import Mixture
from self1e.data.paths import missing, require_paths
from self1e.data.samples import Sample, naming
from self1e.data.splits import SPLITS, load_split, split_paths

log = logging.getLogger(__name__)


def build_mixture(config: DataConfig, *, batch_size: int, seed: int, mode: str = "published") -> Mixture:
    """The training mixture of the selected sets; see `Mixture` for the arguments.

    Raises UserError for bad arguments or schemas, and one that names every missing path.
    """
    require_paths(config.paths())
    excluded = evaluation_keys(config.dataset_dir) if config.exclude_val else None
    groups = []
    for choices in config.families:
        sets = [choice.open() for choice in choices]
        for problem in dict.fromkeys(problem for data in sets for problem in data.problems):
            log.warning("%s", problem)
        traits = [(data.rated, data.segmentation, data.redrawn) for data in sets]
        for kind in sorted(set(traits), reverse=True):
            members = [data for data, its in zip(sets, traits) if its == kind]
            groups.append((members, choices[0].rate if kind[0] else 1))
    return Mixture(groups, batch_size=batch_size, seed=seed, mode=mode, excluded=excluded)


def evaluation_keys(dataset_dir: str | Path) -> np.ndarray:
    """Sorted `image_key`s of every photo of the evaluation splits that are on disk."""
    there = [name for name in SPLITS if not missing(split_paths([name], dataset_dir))]
    keys = (load_split(name, dataset_dir).image_keys() for name in there)
    return np.unique(np.concatenate([np.zeros(0, np.int64), *keys]))


@dataclass
class Encode:
    """Turn samples into what a batch is made of; one that does not fit counts as broken."""

    processor: Any
    max_length: int
    max_tiles: int

    def __call__(self, sample: Sample) -> dict:
        limits = {"max_length": self.max_length, "max_tiles": self.max_tiles}
        with naming(sample.id):
            encoded = self.processor.encode(sample.image, sample.conversations, sample.masks, **limits)
        return encoded | {"id": sample.id, "replaced": sample.replaced}

    def collate(self, encoded: list[dict], groups: int) -> dict:
        """Join encoded samples to a batch that also names its samples and the broken ones that they replace."""
        ids, replaced = [entry["id"] for entry in encoded], [pair for entry in encoded for pair in entry["replaced"]]
        return dict(self.processor.collate(encoded, groups=groups)) | {"ids": ids, "replaced": replaced}


@dataclass
class Stream(Dataset):
    """The encoded samples of a mixture by their slots."""

    mixture: Mixture
    encode: Encode

    def __getitem__(self, slot: int) -> dict:
        return self.mixture.build(slot, self.encode)


def make_loader(
    mixture: Mixture,
    encode: Encode,
    *,
    epoch: int,
    rank: int = 0,
    world_size: int = 1,
    first: int = 0,
    stop: int | None = None,
    workers: int = 0,
    timeout: float = 0,
    groups: int = 2,
) -> DataLoader:
    """This rank's batches of an epoch: what `processor.collate` makes, with `ids` and `replaced`.

    first, stop: take these micro-batches of the epoch alone, as after a resume
    workers:     processes that read and encode; 0: this one does
    timeout:     seconds after which a worker that gives nothing is an error; 0: never
    groups:      of conversations of similar length in a batch, at most (see `processor.collate`)
    """
    plan = mixture.micro_batches(epoch, rank=rank, world_size=world_size)[first:stop]
    return DataLoader(
        Stream(mixture, encode),
        batch_sampler=[slots.tolist() for slots in plan],
        collate_fn=partial(encode.collate, groups=groups),
        num_workers=workers,
        timeout=timeout if workers else 0,
        pin_memory=torch.cuda.is_available(),
        worker_init_fn=distributed.ignore_signals,
        generator=torch.Generator(),  # workers' seeds come from here and not from the training's own stream
    )
