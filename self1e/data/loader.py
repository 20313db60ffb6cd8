"""From selected sets to batches: `make_loader(Stream(Mixture(select(...), ...), processor, ...), plan)`."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from self1e import distributed
from self1e.data.mixture import Mixture
from self1e.data.samples import Sample, naming


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
        ids = [entry["id"] for entry in encoded]
        replaced = [broken for entry in encoded for broken in entry["replaced"]]
        return dict(self.processor.collate(encoded, groups=self.groups)) | {"ids": ids, "replaced": replaced}


def make_loader(stream: Stream, plan: Sequence[Any], *, workers: int = 0, timeout: float = 0) -> DataLoader:
    """The batches of a plan of `Mixture.micro_batches`.

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
