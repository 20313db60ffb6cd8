"""From the mixture to batches: what data workers do, and which rank reads which micro-batch."""

from collections import Counter
from collections.abc import Iterator

from torch.utils.data import Dataset

from self1e.data.mixture import AllBroken, Mixture


class TooManyBroken(RuntimeError):
    """More samples than tolerated could not be read."""


class Collate:
    """Join encoded samples to a batch that also names its samples and the broken ones that they replace."""

    def __init__(self, processor, *, groups: int = 2):
        self.processor, self.groups = processor, groups

    def __call__(self, encoded: list[dict | TooManyBroken]) -> dict:
        whole = [entry for entry in encoded if not isinstance(entry, TooManyBroken)]
        if len(whole) < len(encoded):
            return {"failed": next(entry for entry in encoded if isinstance(entry, TooManyBroken))}
        replaced = [pair for entry in whole for pair in entry["replaced"]]
        return dict(self.processor.collate(whole, groups=self.groups)) | {
            "ids": [entry["id"] for entry in whole],
            "replaced": replaced,
        }


class Stream(Dataset):
    """The mixture as the map from places to samples that a DataLoader reads."""

    def __init__(self, mixture: Mixture, encode):
        self.mixture, self.encode = mixture, encode

    def __len__(self) -> int:
        return self.mixture.epoch_size

    def __getitem__(self, place: int) -> dict | TooManyBroken:
        try:
            return self.mixture.build(place, self.encode)
        except AllBroken as error:  # raised by the main process: from a worker it would come inside a traceback
            return TooManyBroken(str(error))


class MicroBatches:
    """This rank's micro-batches of an epoch, as the DataLoader's batch sampler.

    Args:
        limit: the most micro-batches per epoch (`--steps_per_epoch`).
        first_epoch: epoch of the mixture that stands for the Trainer's epoch 0 (`--start_epoch`).
    """

    def __init__(
        self, mixture: Mixture, *, rank: int, world_size: int, limit: int | None = None, first_epoch: int = 0
    ):
        self.mixture, self.rank, self.world_size = mixture, rank, world_size
        self.limit, self.first_epoch, self.epoch = limit, first_epoch, 0
        self.length = len(mixture.micro_batches(first_epoch, rank=rank, world_size=world_size)[:limit])
        self.batch_size, self.drop_last = mixture.batch_size, False  # accelerate reads them when it skips batches

    @property
    def batch_sampler(self) -> "MicroBatches":
        """The Trainer looks for `set_epoch` behind this name, where accelerate's wrappers keep the inner sampler."""
        return self

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[list[int]]:
        plan = self.mixture.micro_batches(self.first_epoch + self.epoch, rank=self.rank, world_size=self.world_size)
        yield from (places.tolist() for places in plan[: self.limit])


def broken_list(broken: list[tuple[str, str]], *, lines: int = 30) -> str:
    """One line per broken sample, those drawn most often first: how often, id, cause. At most `lines` of them."""
    counts = Counter(broken).most_common()
    rest = [f"  and {len(counts) - lines:,} more"] if len(counts) > lines else []
    return "\n".join([f"  {times} x {id}: {cause}" for (id, cause), times in counts[:lines]] + rest)
