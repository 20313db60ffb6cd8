"""The training mixture of the selected sets.

mixture = build_mixture(config, batch_size=5, seed=0)
for places in mixture.micro_batches(epoch, rank=0, world_size=1): samples = [mixture[place] for place in places]
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from self1e.data.families import DataConfig
from self1e.data.mixture import Group, Mixture
from self1e.data.paths import missing, require_paths
from self1e.data.samples import Sample, say_once
from self1e.data.splits import SPLITS, load_split, split_paths


def evaluation_keys(dataset_dir: str | Path) -> np.ndarray:
    """Sorted `image_key`s of every photo of the evaluation splits that are on disk."""
    keys = [load_split(name, dataset_dir).keys() for name in SPLITS if not missing(split_paths([name], dataset_dir))]
    return np.unique(np.concatenate(keys)) if keys else np.zeros(0, np.int64)


def build_mixture(
    config: DataConfig,
    *,
    batch_size: int,
    seed: int,
    mode: str = "published",
    transform: Callable[[Sample], Any] | None = None,
) -> Mixture:
    """The training mixture of the selected sets; see `Mixture` for the arguments.

    Raises ValueError for bad arguments or schemas; FileNotFoundError naming every missing path.
    """
    require_paths(config.paths())
    excluded = evaluation_keys(config.dataset_dir) if config.exclude_val else None
    groups = []
    for family in config.families:
        sets = []
        for choice in family.sets:
            data = choice.open(
                config.dataset_dir, config.data_dir, rows=config.rows, allow_outside=config.allow_outside
            )
            for remark in data.remarks():
                say_once(remark)
            if excluded is not None:
                data.exclude(excluded)
            sets.append(data)
        kinds = dict.fromkeys((data.rated, data.segmentation, data.redrawn) for data in sets)
        for rated, segmentation, redrawn in sorted(kinds, reverse=True):
            alike = [d for d in sets if (d.rated, d.segmentation, d.redrawn) == (rated, segmentation, redrawn)]
            groups.append(Group(alike, family.rate if rated else 1, segmentation, redraw=redrawn))
    return Mixture(groups, batch_size=batch_size, seed=seed, mode=mode, transform=transform)
