"""self1e/data/mixture.py: batches of the mixture, which ranks read which, broken samples, workers."""

import numpy as np
import pytest
import torch
from helpers import noise
from streams import Numbers

from self1e.data.mixture import Mixture, Stream, make_loader
from self1e.data.samples import Sample
from self1e.errors import UserError


class Photos(Numbers):
    """`Numbers` with a photo, a sentence and a mask each."""

    def read(self, index, rng):
        super().read(index, rng)
        image = noise(20, 12, seed=index)
        return Sample(f"{self.name}/{index}", image, [["<image>\nit?", "[SEG]."]], [np.ones((1, 12, 20), np.uint8)])


@pytest.fixture
def stream(tiny_processor):
    def make(size=12, broken=(), max_length=512):
        mixture = Mixture([([Photos("a", size, broken)], 1)], batch_size=2, seed=0, mode="exact")
        return Stream(mixture, tiny_processor, max_length, max_tiles=1)

    return make


def plan(stream, epoch=0, rank=0, world_size=1):
    return stream.mixture.micro_batches(epoch, rank=rank, world_size=world_size)


def read(stream, plan, **options):
    return [batch["ids"] for batch in make_loader(stream, plan, **options)]


@pytest.mark.parametrize("size", [12, 13])
def test_ranks_share_the_epoch_and_nothing_twice(stream, size):
    ranks = [read(stream(size), plan(stream(size), rank=rank, world_size=2)) for rank in range(2)]
    assert len(ranks[0]) == len(ranks[1]) == -(-size // 4)
    assert sorted(id for batches in ranks for ids in batches for id in ids) == sorted(f"a/{k}" for k in range(size))


def test_epochs_differ_repeat_and_can_be_read_in_part(stream):
    data = stream()
    whole = read(data, plan(data))
    assert read(data, plan(data)) == whole != read(data, plan(data, epoch=1))
    assert read(data, plan(data)[2:4]) == whole[2:4] == read(data, plan(data)[2:4], workers=1)


def test_batches_name_their_samples_and_the_broken_ones_they_replace(stream):
    data = stream(broken=(3,))
    batches = list(make_loader(data, plan(data), workers=2, timeout=60))
    assert sum(len(batch["ids"]) for batch in batches) == 12 and "a/3" not in sum((b["ids"] for b in batches), [])
    assert sum((batch["replaced"] for batch in batches), []) == ["a/3: torn"]
    assert all(isinstance(batch["labels"], torch.Tensor) and len(batch["input_ids"]) == 2 for batch in batches)


def test_a_set_that_is_broken_throughout_says_so(stream):
    data = stream(broken=range(12))
    with pytest.raises(UserError, match="^21 samples tried for one slot are all broken:\na/[0-9]+: torn"):
        read(data, plan(data))


def test_a_conversation_too_long_counts_as_broken(stream):
    with pytest.raises(UserError, match="a/0.*--model_max_length 10"):
        stream(max_length=10).encode(Photos("a", 1).read(0, np.random.default_rng(0)))
