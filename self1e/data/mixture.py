"""The training stream: which sample stands at which slot of which micro-batch, on any number of ranks and workers.

A plan is integers only. A slot is an integer that packs (epoch, set, item, draw); the sample behind it is a pure
function of (seed, slot), so workers, ranks and resuming cannot change it.

A capped set (COCO-Stuff, PACO, the question sets) takes part with `cap` of its samples each time that the rate passes
over it. Every pass draws its own from (seed, epoch, pass), so that several passes see more of the set; the plan holds
the drawn samples themselves, and no worker keeps a subset.
"""

import dataclasses
import logging
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from self1e.data.samples import Sample, SampleError, TrainingSet, check_sample
from self1e.errors import UserError

log = logging.getLogger(__name__)

MODES = ("published", "exact")
ATTEMPTS = 20  # samples tried instead of a broken one
SAME_SET_ATTEMPTS = 10  # of them, from the same set
# Fields of a slot from the top; 63 bits in all, so that it fits a signed 64-bit integer.
EPOCH_BITS, SET_BITS, ITEM_BITS, DRAW_BITS = 12, 5, 22, 24
# Streams of the plan's own generators: three numbers, and six for subsets, whereas those of samples take five.
SHARE, REDRAW, SHUFFLE, REPLACE, SUBSET = range(5)


class AllBroken(UserError):
    """Every sample tried for one slot is broken."""


def pack(epoch: Any, set: Any, item: Any, draw: Any) -> Any:
    """Slot(s), int64, of integers or integer arrays."""
    return (((epoch << SET_BITS | set) << ITEM_BITS | item) << DRAW_BITS) | draw


def unpack(slot: int) -> tuple[int, int, int, int]:
    """(epoch, set, item, draw) of one slot."""
    slot = int(slot)
    draw, slot = slot & (1 << DRAW_BITS) - 1, slot >> DRAW_BITS
    item, slot = slot & (1 << ITEM_BITS) - 1, slot >> ITEM_BITS
    return slot >> SET_BITS, slot & (1 << SET_BITS) - 1, item, draw


class Records:
    """Those records of a set that take part: all, or those whose photo is not among `excluded` (see `image_key`)."""

    def __init__(self, data: TrainingSet, excluded: np.ndarray | None = None):
        self.data = data
        self.numbers = np.arange(len(data), dtype=np.int32)  # item -> record of the set
        if excluded is not None:
            self.numbers = self.numbers[~np.isin(data.image_keys(), excluded)]

    def __len__(self) -> int:
        return len(self.numbers)

    @property
    def per_pass(self) -> int:
        """Samples that one pass takes: all of them, or the set's cap."""
        return len(self) if self.data.cap is None else min(self.data.cap, len(self))

    def sample(self, item: int, rng: np.random.Generator) -> Sample:
        """Sample `item` in [0, len); one without usable labels is served by the next that has some, cyclically.

        Raises SampleError when it is broken, which includes a text that holds a control token.
        """
        for step in range(len(self)):
            sample = self.data.read(int(self.numbers[(item + step) % len(self)]), rng)
            if sample is not None:
                check_sample(sample)
                return sample
        raise SampleError(self.data.name, "no image of this set has a usable label")


@dataclasses.dataclass
class Group:
    """Sets that share a rate.

    rate:         times each sample stands in an epoch; of the fraction, a random share of the samples of all sets
    segmentation: their samples carry masks
    redraw:       mode "published" draws the items of these slots with replacement
    """

    sets: list[TrainingSet]
    rate: float
    segmentation: bool
    redraw: bool


def group_size(rate: float, members: list[Records]) -> int:
    """Slots of a group in an epoch."""
    total = sum(records.per_pass for records in members)
    return int(rate) * total + int((rate % 1) * total + 0.5)


class Mixture:
    """Training sets mixed by rates; `mixture[slot]` is a sample, `micro_batches` says which slots, in which order.

    mode "published": an epoch is a shuffle of all slots; the last slot of every micro-batch goes to a random
                      segmentation sample instead, drawn from the epoch's own segmentation slots
    mode "exact":     each slot of the epoch once, arranged so that as many micro-batches as possible hold a
                      segmentation sample
    Neither constrains anything at batch size 1 or without segmentation sets.

    excluded: `image_key`s of photos whose samples do not take part
    """

    def __init__(
        self,
        groups: list[Group],
        *,
        batch_size: int,
        seed: int,
        mode: str = "published",
        excluded: np.ndarray | None = None,
    ):
        if mode not in MODES:
            raise UserError(f"--mixture is {mode!r}; known: {', '.join(MODES)}")
        if batch_size < 1:
            raise UserError(f"--batch_size is {batch_size}; expected at least 1")
        if seed < 0:
            raise UserError(f"--seed is {seed}; expected 0 or more")
        self.groups = [(group, [Records(data, excluded) for data in group.sets]) for group in groups]
        self.sets = [records for _, members in self.groups for records in members]
        self.segmentation = [group.segmentation for group in groups for _ in group.sets]
        self.batch_size, self.seed, self.mode = batch_size, seed, mode
        self._logged: set[str] = set()
        if not self.epoch_size:
            raise UserError("the mixture is empty: check --sample_rates, --exclude_val and the datasets")
        assert len(self.sets) <= 1 << SET_BITS and max(map(len, self.sets)) <= 1 << ITEM_BITS
        if 2 * self.epoch_size > 1 << DRAW_BITS:
            raise UserError(f"an epoch of {self.epoch_size} samples is too large; lower --sample_rates")

    @property
    def epoch_size(self) -> int:
        """Slots (samples) in an epoch, the same in every epoch."""
        return sum(group_size(group.rate, members) for group, members in self.groups)

    @property
    def sizes(self) -> dict[str, int]:
        """Samples of each set that take part, before rates; a name that occurs again gets a number."""
        names = [records.data.name for records in self.sets]
        names = [f"{name} #{names[:k].count(name)}" if name in names[:k] else name for k, name in enumerate(names)]
        return {name: records.per_pass for name, records in zip(names, self.sets, strict=True)}

    # ------------------------------------------------------------------------------------------ plan
    def _rng(self, epoch: int, stream: int) -> np.random.Generator:
        return np.random.default_rng([self.seed, epoch, stream])

    def _pass(self, number: int, epoch: int, repetition: int) -> np.ndarray:
        """Items of the capped set `number`, int64 (cap,), that one of the passes of an epoch takes."""
        records = self.sets[number]
        rng = np.random.default_rng([self.seed, epoch, SUBSET, number, repetition, 0])
        return np.sort(rng.choice(len(records), records.per_pass, replace=False))

    def _slots(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Slots of an epoch in the order of the sets, int64 (n,), and whether each is a segmentation sample."""
        slots, segmentation, first = [], [], 0
        share, redraw = self._rng(epoch, SHARE), self._rng(epoch, REDRAW)
        for group, members in self.groups:
            sizes = [records.per_pass for records in members]
            total, whole = sum(sizes), int(group.rate)
            part = np.sort(share.choice(max(total, 1), group_size(group.rate, members) - whole * total, replace=False))
            flat = np.concatenate([np.tile(np.arange(total), whole), part]).astype(np.int64)
            repetitions = np.repeat(np.arange(whole + 1), [total] * whole + [len(part)])
            draws = repetitions
            if group.redraw and self.mode == "published" and total:
                flat, draws = redraw.integers(total, size=len(flat)), np.arange(len(flat))
            starts = np.cumsum([0, *sizes])
            sets = np.searchsorted(starts, flat, side="right") - 1
            items = flat - starts[sets]
            for k, records in enumerate(members):
                if sizes[k] < len(records):
                    for repetition in range(whole + 1):
                        chosen = (sets == k) & (repetitions == repetition)
                        items[chosen] = self._pass(first + k, epoch, repetition)[items[chosen]]
            slots.append(pack(np.int64(epoch), first + sets, items, draws))
            segmentation.append(np.full(len(flat), group.segmentation))
            first += len(sizes)
        return np.concatenate(slots), np.concatenate(segmentation)

    def micro_batches(self, epoch: int, *, rank: int, world_size: int) -> list[np.ndarray]:
        """The rank's micro-batches of an epoch, each an int64 array of 1 to `batch_size` slots for `mixture[slot]`.

        Every rank gets ceil(n / (batch_size * world_size)) of them; the n slots are split evenly, and micro-batch j
        of all goes to rank j % world_size. With batch size 1 and n no multiple of world_size, the first slots of the
        epoch stand again at its end. Raises UserError when there are fewer samples than ranks.
        """
        assert 0 <= epoch < 1 << EPOCH_BITS
        n = self.epoch_size
        if n < world_size:
            raise UserError(f"{n} training samples are fewer than the {world_size} processes")
        count = -(-n // (self.batch_size * world_size)) * world_size
        slots, segmentation = self._slots(epoch)
        order = self._rng(epoch, SHUFFLE).permutation(n)
        if n < count:  # only with batch size 1
            order = np.concatenate([order, order[: count - n]])
        sizes = np.full(count, len(order) // count)
        sizes[: len(order) % count] += 1
        stops = np.cumsum(sizes)
        if self.batch_size > 1 and segmentation.any():
            if self.mode == "published":
                chosen = slots[segmentation]
                chosen = chosen[self._rng(epoch, REPLACE).integers(len(chosen), size=count)]
                # A draw number of its own: another choice of sentences than at the item's regular slot.
                chosen = (chosen >> DRAW_BITS << DRAW_BITS) | (n + np.arange(count))
                slots = slots[order]
                slots[stops - 1] = chosen
            else:
                slots = slots[self._spread(order, segmentation, stops, epoch)]
        else:
            slots = slots[order]
        return [slots[stops[j] - sizes[j] : stops[j]] for j in range(rank, count, world_size)]

    def _spread(self, order: np.ndarray, segmentation: np.ndarray, stops: np.ndarray, epoch: int) -> np.ndarray:
        """`order` with a segmentation slot at the end of as many micro-batches as there are such slots."""
        first = order[segmentation[order]][: len(stops)]
        ends = self._rng(epoch, REPLACE).permutation(stops - 1)[: len(first)]
        rest = np.ones(len(order), bool)
        rest[ends] = False
        spread = np.empty_like(order)
        spread[ends] = first
        spread[rest] = order[~np.isin(order, first)]
        return spread

    # ------------------------------------------------------------------------------------------ samples
    def __getitem__(self, slot: int) -> Sample:
        """The sample of a slot (see `build`)."""
        return self.build(slot, lambda sample: sample)

    def build(self, slot: int, transform: Callable[[Sample], Any]) -> Any:
        """What `transform` makes of the sample of a slot.

        A broken one (SampleError from its set or from `transform`) is logged once by its id, and others, drawn from
        (seed, slot, attempt), are tried instead: first of the same set, then of all sets of its kind. What replaced
        it lists it in `Sample.replaced`. Raises AllBroken after ATTEMPTS broken ones.
        """
        epoch, number, item, draw = unpack(slot)
        rng = np.random.default_rng([self.seed, epoch, number, item, draw])
        replaced: tuple[tuple[str, str], ...] = ()
        for attempt in range(ATTEMPTS + 1):
            if attempt:
                rng = np.random.default_rng([self.seed, int(slot), attempt, ATTEMPTS])
                kin = self._kin(number) if attempt > SAME_SET_ATTEMPTS else [number]
                number = kin[int(rng.integers(len(kin)))]
                item = int(rng.integers(len(self.sets[number])))
            try:
                sample = self.sets[number].sample(item, rng)
                return transform(dataclasses.replace(sample, replaced=replaced))
            except SampleError as error:
                replaced += ((error.id, error.cause),)
                if error.id not in self._logged:
                    self._logged.add(error.id)
                    log.warning("broken sample %s: %s; another one replaces it", error.id, error.cause)
        causes = "\n".join(f"{id}: {cause}" for id, cause in replaced)
        raise AllBroken(f"{len(replaced)} samples tried for one slot are all broken:\n{causes}")

    def _kin(self, number: int) -> Sequence[int]:
        """Sets of the same kind, with or without masks, that are not empty."""
        return [k for k, kind in enumerate(self.segmentation) if kind == self.segmentation[number] and self.sets[k]]
