"""The training stream: which sample stands at which place of which micro-batch, on any number of ranks and workers.

A plan is integers only. A place is an integer that packs (epoch, set, item, draw); the sample behind it is a pure
function of (seed, place), so workers, ranks and resuming cannot change it.

A capped set (COCO-Stuff, PACO, the question sets) takes part with `cap` of its samples each time that the rate passes
over it. Every pass draws its own from (seed, epoch, pass), so that several passes see more of the set; the plan holds
the drawn samples themselves, and no worker keeps a subset.
"""

import dataclasses
import logging
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from self1e.data.samples import Sample, SampleError, TrainingSet

log = logging.getLogger(__name__)

MODES = ("published", "exact")
ATTEMPTS = 20  # samples tried in place of a broken one
SAME_SET_ATTEMPTS = 10  # of them, from the same set
# Fields of a place from the top; 63 bits in all, so that it fits a signed 64-bit integer.
EPOCH_BITS, SET_BITS, ITEM_BITS, DRAW_BITS = 12, 5, 22, 24
# Streams of the plan's own generators: three numbers, and six for subsets, whereas those of samples take five.
SHARE, REDRAW, SHUFFLE, REPLACE, SUBSET = range(5)


class AllBroken(RuntimeError):
    """Every sample tried for one place is broken."""


def pack(epoch: Any, set: Any, item: Any, draw: Any) -> Any:
    """Place(s), int64, of integers or integer arrays."""
    return (((epoch << SET_BITS | set) << ITEM_BITS | item) << DRAW_BITS) | draw


def unpack(place: int) -> tuple[int, int, int, int]:
    """(epoch, set, item, draw) of one place."""
    place = int(place)
    draw, place = place & (1 << DRAW_BITS) - 1, place >> DRAW_BITS
    item, place = place & (1 << ITEM_BITS) - 1, place >> ITEM_BITS
    return place >> SET_BITS, place & (1 << SET_BITS) - 1, item, draw


def samples_per_pass(data: TrainingSet) -> int:
    """Samples of a set that one pass takes: all of them, or its cap."""
    return len(data) if data.cap is None else min(data.cap, len(data))


@dataclasses.dataclass
class Group:
    """Sets that share a rate.

    rate:         times each sample stands in an epoch; of the fraction, a random share of the samples of all sets
    segmentation: its samples carry masks
    redraw:       mode "published" draws the items of these places with replacement
    """

    sets: list[TrainingSet]
    rate: float
    segmentation: bool
    redraw: bool

    @property
    def size(self) -> int:
        """Places in an epoch."""
        total = sum(map(samples_per_pass, self.sets))
        return int(self.rate) * total + int((self.rate % 1) * total + 0.5)


class Mixture:
    """Training sets mixed by rates; `mixture[place]` is a sample, `micro_batches` says which places, in which order.

    mode "published": an epoch is a shuffle of all places; the last place of every micro-batch goes to a random
                      segmentation sample instead, drawn from the epoch's own segmentation places
    mode "exact":     each place of the epoch once, arranged so that as many micro-batches as possible hold a
                      segmentation sample
    Neither constrains anything at batch size 1 or without segmentation sets.

    transform: Sample -> what `mixture[place]` returns (e.g. a processed sample); None gives the Sample
    """

    def __init__(
        self,
        groups: list[Group],
        *,
        batch_size: int,
        seed: int,
        mode: str = "published",
        transform: Callable[[Sample], Any] | None = None,
    ):
        if mode not in MODES:
            raise ValueError(f"--mixture is {mode!r}; known: {', '.join(MODES)}")
        if batch_size < 1:
            raise ValueError(f"--batch_size is {batch_size}; expected at least 1")
        if seed < 0:
            raise ValueError(f"--seed is {seed}; expected 0 or more")
        self.groups = groups
        self.sets = [data for group in groups for data in group.sets]
        self.segmentation = [group.segmentation for group in groups for _ in group.sets]
        self.batch_size, self.seed, self.mode, self.transform = batch_size, seed, mode, transform
        self._logged: set[str] = set()
        if not self.epoch_size:
            raise ValueError("the mixture is empty: check --sample_rates, --exclude_val and the datasets")
        assert len(self.sets) <= 1 << SET_BITS and max(map(len, self.sets)) <= 1 << ITEM_BITS
        if 2 * self.epoch_size > 1 << DRAW_BITS:
            raise ValueError(f"an epoch of {self.epoch_size} samples is too large; lower --sample_rates")

    @property
    def epoch_size(self) -> int:
        """Places (samples) in an epoch, the same in every epoch."""
        return sum(group.size for group in self.groups)

    @property
    def sizes(self) -> dict[str, int]:
        """Samples of each set that take part, before rates."""
        return {data.name: samples_per_pass(data) for data in self.sets}

    def describe(self) -> dict[str, dict[str, Any]]:
        """What tells the data from others wherever they lie: `samples` and `data`, size and digest by set."""
        labels = [data.label for data in self.sets]
        labels = [
            f"{label} #{labels[:k].count(label)}" if label in labels[:k] else label for k, label in enumerate(labels)
        ]
        return {
            "samples": dict(zip(labels, map(samples_per_pass, self.sets), strict=True)),
            "data": {label: data.digest() for label, data in zip(labels, self.sets, strict=True)},
        }

    # ------------------------------------------------------------------------------------------ plan
    def _rng(self, epoch: int, stream: int) -> np.random.Generator:
        return np.random.default_rng([self.seed, epoch, stream])

    def _pass(self, number: int, epoch: int, repetition: int) -> np.ndarray:
        """Items of the capped set `number`, int64 (cap,), that one of the passes of an epoch takes."""
        data = self.sets[number]
        rng = np.random.default_rng([self.seed, epoch, SUBSET, number, repetition, 0])
        return np.sort(rng.choice(len(data), samples_per_pass(data), replace=False))

    def _places(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Places of an epoch in the order of the sets, int64 (n,), and whether each is a segmentation sample."""
        places, segmentation, first = [], [], 0
        share, redraw = self._rng(epoch, SHARE), self._rng(epoch, REDRAW)
        for group in self.groups:
            sizes = [samples_per_pass(data) for data in group.sets]
            total, whole = sum(sizes), int(group.rate)
            part = np.sort(share.choice(max(total, 1), group.size - whole * total, replace=False))
            flat = np.concatenate([np.tile(np.arange(total), whole), part]).astype(np.int64)
            repetitions = np.repeat(np.arange(whole + 1), [total] * whole + [len(part)])
            draws = repetitions
            if group.redraw and self.mode == "published" and total:
                flat, draws = redraw.integers(total, size=len(flat)), np.arange(len(flat))
            starts = np.cumsum([0, *sizes])
            sets = np.searchsorted(starts, flat, side="right") - 1
            items = flat - starts[sets]
            for k, data in enumerate(group.sets):
                if sizes[k] < len(data):
                    for repetition in range(whole + 1):
                        chosen = (sets == k) & (repetitions == repetition)
                        items[chosen] = self._pass(first + k, epoch, repetition)[items[chosen]]
            places.append(pack(np.int64(epoch), first + sets, items, draws))
            segmentation.append(np.full(len(flat), group.segmentation))
            first += len(sizes)
        return np.concatenate(places), np.concatenate(segmentation)

    def micro_batches(self, epoch: int, *, rank: int, world_size: int) -> list[np.ndarray]:
        """The rank's micro-batches of an epoch, each an int64 array of 1 to `batch_size` places for `mixture[place]`.

        Every rank gets ceil(n / (batch_size * world_size)) of them; the n places are split evenly, and micro-batch j
        of all goes to rank j % world_size. With batch size 1 and n no multiple of world_size, the first places of the
        epoch stand again at its end. Raises ValueError when there are fewer samples than ranks.
        """
        assert 0 <= epoch < 1 << EPOCH_BITS
        n = self.epoch_size
        if n < world_size:
            raise ValueError(f"{n} training samples are fewer than the {world_size} processes")
        count = -(-n // (self.batch_size * world_size)) * world_size
        places, segmentation = self._places(epoch)
        order = self._rng(epoch, SHUFFLE).permutation(n)
        if n < count:  # only with batch size 1
            order = np.concatenate([order, order[: count - n]])
        sizes = np.full(count, len(order) // count)
        sizes[: len(order) % count] += 1
        stops = np.cumsum(sizes)
        if self.batch_size > 1 and segmentation.any():
            if self.mode == "published":
                chosen = places[segmentation]
                chosen = chosen[self._rng(epoch, REPLACE).integers(len(chosen), size=count)]
                # A draw number of its own: another choice of sentences than at the item's regular place.
                chosen = (chosen >> DRAW_BITS << DRAW_BITS) | (n + np.arange(count))
                places = places[order]
                places[stops - 1] = chosen
            else:
                places = places[self._spread(order, segmentation, stops, epoch)]
        else:
            places = places[order]
        return [places[stops[j] - sizes[j] : stops[j]] for j in range(rank, count, world_size)]

    def _spread(self, order: np.ndarray, segmentation: np.ndarray, stops: np.ndarray, epoch: int) -> np.ndarray:
        """`order` with a segmentation place at the end of as many micro-batches as there are such places."""
        first = order[segmentation[order]][: len(stops)]
        ends = self._rng(epoch, REPLACE).permutation(stops - 1)[: len(first)]
        rest = np.ones(len(order), bool)
        rest[ends] = False
        spread = np.empty_like(order)
        spread[ends] = first
        spread[rest] = order[~np.isin(order, first)]
        return spread

    # ------------------------------------------------------------------------------------------ samples
    def __getitem__(self, place: int) -> Any:
        """The sample of a place, through `transform`.

        A broken one (SampleError from its set or from `transform`) is logged once by its id, and others, drawn from
        (seed, place, attempt), are tried in its place: first of the same set, then of all sets of its kind. What took
        the place lists it in `Sample.replaced`. Raises AllBroken after ATTEMPTS broken ones.
        """
        epoch, number, item, draw = unpack(place)
        rng = np.random.default_rng([self.seed, epoch, number, item, draw])
        replaced: tuple[tuple[str, str], ...] = ()
        for attempt in range(ATTEMPTS + 1):
            if attempt:
                rng = np.random.default_rng([self.seed, int(place), attempt, ATTEMPTS])
                kin = self._kin(number) if attempt > SAME_SET_ATTEMPTS else [number]
                number = kin[int(rng.integers(len(kin)))]
                item = int(rng.integers(len(self.sets[number])))
            try:
                sample = self.sets[number].sample(item, rng)
                sample = dataclasses.replace(sample, replaced=replaced)
                return sample if self.transform is None else self.transform(sample)
            except SampleError as error:
                replaced += ((error.id, error.cause),)
                if error.id not in self._logged:
                    self._logged.add(error.id)
                    log.warning("broken sample %s: %s; another takes its place", error.id, error.cause)
        causes = "\n".join(f"{id}: {cause}" for id, cause in replaced)
        raise AllBroken(f"{len(replaced)} samples tried for one place are all broken:\n{causes}")

    def _kin(self, number: int) -> Sequence[int]:
        """Sets of the same kind, with or without masks, that are not empty."""
        return [k for k, kind in enumerate(self.segmentation) if kind == self.segmentation[number] and self.sets[k]]
