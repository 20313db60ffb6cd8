"""The training stream: which sample stands at which slot of which micro-batch, on any number of ranks and workers.

    make_loader(Stream(Mixture(select(...), ...), processor, ...), plan)

A plan is integers only. A slot is (epoch, set, item, draw); the sample behind it is a pure function of (seed, slot),
so workers, ranks and resuming cannot change it. Of a capped set every pass of an epoch draws `cap` samples of its own
from (seed, epoch, pass), so that several passes see more of the set.
"""

import logging
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from self1e import distributed
from self1e.data.samples import Sample, TrainingSet, naming
from self1e.errors import UserError

log = logging.getLogger(__name__)

MODES = ("published", "exact")
ATTEMPTS = 20  # samples tried instead of a broken one
SAME_SET_ATTEMPTS = 10  # of them, from the same set
# Streams of the plan's own generators: three numbers, and six for subsets, whereas those of samples take five.
SHARE, REDRAW, SHUFFLE, REPLACE, SUBSET = range(5)


class Pool:
    """Those records of a set that take part: all, or those whose photo is not among `excluded` (see `image_key`)."""

    def __init__(self, data: TrainingSet, excluded: np.ndarray | None):
        self.data = data.opened()
        if not len(data):
            raise UserError(f"{data.name}: no training samples in its files")
        for problem in data.problems:
            log.warning("%s", problem)
        self.numbers = np.arange(len(data), dtype=np.int32)  # item -> record of the set
        if excluded is not None:
            self.numbers = self.numbers[~np.isin(data.image_keys(), excluded)]
        self.per_pass = min(data.cap or len(self), len(self))  # samples that one pass takes

    def __len__(self) -> int:
        return len(self.numbers)

    def sample(self, item: int, rng: np.random.Generator) -> Sample:
        """Sample `item` in [0, len); one without usable labels is served by the next that has some, cyclically."""
        for step in range(len(self)):
            sample = self.data.sample(int(self.numbers[(item + step) % len(self)]), rng)
            if sample is not None:
                return sample
        raise UserError(f"{self.data.name}: no image of this set has a usable label")


class Mixture:
    """Training sets mixed by rates; `build` makes the sample of a slot, `micro_batches` orders the slots of an epoch.

    families: sets, not opened yet, and their rate: the times that each sample stands in an epoch; of a fraction, a
            random share of the samples of all sets of a kind (with masks or not, redrawn or not)
    mode:   "published": an epoch is a shuffle of all slots, but the last one of every micro-batch is a random
            segmentation slot of the epoch, and the items of redrawn sets are drawn with replacement; "exact": each
            slot once, arranged so that as many micro-batches as possible hold a segmentation sample. Neither
            constrains batches of size 1, or without segmentation sets
    """

    def __init__(
        self,
        families: Sequence[tuple[Sequence[TrainingSet], float]],
        *,
        batch_size: int,
        seed: int,
        mode: str = "published",
        excluded: np.ndarray | None = None,  # `image_key`s of photos whose samples do not take part
    ):
        self.batch_size, self.seed, self.mode = batch_size, seed, mode
        self.groups: list[tuple[list[Pool], int, int]] = []  # sets, passes, samples of one more
        self.epoch_size = 0  # slots
        self.sizes: dict[str, int] = {}  # samples of the sets of each name that take part, before rates and caps
        for sets, family_rate in families:
            kinds: dict[tuple[bool, ...], list[Pool]] = defaultdict(list)
            for data in sets:
                pool = Pool(data, excluded)
                kinds[data.rated, data.segmentation, data.redrawn].append(pool)
                self.sizes[data.name] = self.sizes.get(data.name, 0) + len(pool)
            for kind in sorted(kinds, reverse=True):
                total, rate = sum(pool.per_pass for pool in kinds[kind]), family_rate if kind[0] else 1
                share = int((rate % 1) * total + 0.5)
                self.groups.append((kinds[kind], int(rate), share))
                self.epoch_size += int(rate) * total + share
        self.sets = [pool for pools, *_ in self.groups for pool in pools]
        if not self.epoch_size:
            raise UserError("the mixture is empty: check --sample_rates, --exclude_val and the datasets")

    def _rng(self, *numbers: int) -> np.random.Generator:
        return np.random.default_rng([self.seed, *numbers])

    def _slots(self, epoch: int) -> np.ndarray:
        """Slots of an epoch in the order of the groups, int64 (n, 4); the arrays of a group have an entry for each."""
        slots, first = [], 0
        fraction, redraw = self._rng(epoch, SHARE), self._rng(epoch, REDRAW)
        for pools, passes, share in self.groups:
            sizes = [pool.per_pass for pool in pools]
            starts, total = np.cumsum([0, *sizes]), sum(sizes)  # of each set and of all in a pass
            part = np.sort(fraction.choice(max(total, 1), share, replace=False))
            samples = np.concatenate([np.tile(np.arange(total), passes), part]).astype(np.int64)
            repetitions = np.repeat(np.arange(passes + 1), [total] * passes + [len(part)])
            draws = repetitions
            if pools[0].data.redrawn and self.mode == "published" and total:
                samples, draws = redraw.integers(total, size=len(samples)), np.arange(len(samples))
            sets = np.searchsorted(starts, samples, side="right") - 1
            items = samples - starts[sets]
            for k, pool in enumerate(pools):
                for repetition in range(passes + 1) if sizes[k] < len(pool) else ():  # a pass over a capped set
                    rng = self._rng(epoch, SUBSET, first + k, repetition, 0)
                    taken = np.sort(rng.choice(len(pool), sizes[k], replace=False))
                    chosen = (sets == k) & (repetitions == repetition)
                    items[chosen] = taken[items[chosen]]
            slots.append(np.stack([np.full(len(samples), epoch), first + sets, items, draws], axis=1))
            first += len(sizes)
        return np.concatenate(slots)

    def micro_batches(self, epoch: int, *, rank: int, world_size: int) -> list[np.ndarray]:
        """The rank's micro-batches of an epoch, each of 1 to `batch_size` slots for `build`, int64 (slots, 4).

        Every rank gets ceil(n / (batch_size * world_size)) of them; the n slots are split evenly, and micro-batch j of
        all goes to rank j % world_size. With batch size 1 the first slots may stand again at the end of the epoch.
        """
        n = self.epoch_size
        if n < world_size:
            raise UserError(f"{n} training samples are fewer than the {world_size} processes")
        count = -(-n // (self.batch_size * world_size)) * world_size
        slots = self._slots(epoch)
        segmentation = np.array([pool.data.segmentation for pool in self.sets])[slots[:, 1]]
        order = self._rng(epoch, SHUFFLE).permutation(n)
        order = np.concatenate([order, order[: max(0, count - n)]])  # more only with batch size 1
        sizes = len(order) // count + (np.arange(count) < len(order) % count)
        lasts, replace = np.cumsum(sizes) - 1, self._rng(epoch, REPLACE)
        constrained = self.batch_size > 1 and segmentation.any()
        if constrained and self.mode == "exact":
            order = one_for_each(order, segmentation[order], lasts, replace)
        planned = slots[order]
        if constrained and self.mode == "published":
            chosen = slots[segmentation]
            planned[lasts] = chosen[replace.integers(len(chosen), size=count)]
            # A draw number of its own: another choice of sentences than at the item's regular slot.
            planned[lasts, 3] = n + np.arange(count)
        return np.split(planned, lasts[:-1] + 1)[rank::world_size]

    def build(self, slot: Iterable[int], transform: Callable[[Sample], Any] = lambda sample: sample) -> Any:
        """What `transform` makes of the sample of a slot.

        A broken one (UserError from its set or from `transform`) is logged, and others, drawn from (seed, slot,
        attempt), are tried instead: first of the same set, then of all sets of its kind, with or without masks. What
        replaced it lists it in `Sample.replaced`. Raises UserError after ATTEMPTS broken ones.
        """
        epoch, number, item, draw = map(int, slot)
        key = ((epoch << 5 | number) << 22 | item) << 24 | draw  # a single integer, for the seeds of replacements
        rng = self._rng(epoch, number, item, draw)
        kind = self.sets[number].data.segmentation
        replaced: tuple[str, ...] = ()
        for attempt in range(ATTEMPTS + 1):
            if attempt:
                rng = self._rng(key, attempt, ATTEMPTS)
                kin = [k for k, own in enumerate(self.sets) if own and own.data.segmentation == kind]
                kin = kin if attempt > SAME_SET_ATTEMPTS else [number]
                number = kin[int(rng.integers(len(kin)))]
                item = int(rng.integers(len(self.sets[number])))
            try:
                sample = self.sets[number].sample(item, rng)
                sample.replaced = replaced
                return transform(sample)
            except UserError as error:
                replaced += (str(error),)
                log.warning("broken sample %s; another one replaces it", error)
        raise UserError("\n".join([f"{len(replaced)} samples tried for one slot are all broken:", *replaced]))

    __getitem__ = build


def one_for_each(order: np.ndarray, wanted: np.ndarray, lasts: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Another order, in which as many micro-batches as there are wanted slots end with one.

    order: slots. wanted: bool, for each. lasts: indices at which micro-batches end.
    """
    chosen = order[wanted][: len(lasts)]
    ends = rng.permutation(lasts)[: len(chosen)]
    result = np.empty_like(order)
    result[ends] = chosen
    result[~np.isin(np.arange(len(order)), ends)] = order[~np.isin(order, chosen)]
    return result


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
    """The batches of a plan of `Mixture.micro_batches`; timeout: seconds in which a worker must give one, or 0."""
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
