"""Sets of numbers and plans of them, for tests of the training stream."""

from self1e.data.mixture import unpack
from self1e.data.samples import Sample, SampleError


class Numbers:
    """A set whose sample k has the id "<name>/<k>" and one random number as its conversation."""

    def __init__(self, name, size, broken=(), cap=None):
        self.name, self.size, self.broken, self.cap = name, size, set(broken), cap

    def __len__(self):
        return self.size

    def sample(self, index, rng):
        if index in self.broken:
            raise SampleError(f"{self.name}/{index}", "torn")
        return Sample(f"{self.name}/{index}", None, [[str(rng.integers(1 << 40))]], [])


def ids(mixture, places):
    return [f"{mixture.sets[unpack(t)[1]].name}/{unpack(t)[2]}" for t in places]


def epoch_batches(mixture, world=1, epoch=0):
    ranks = [mixture.micro_batches(epoch, rank=rank, world_size=world) for rank in range(world)]
    assert len({len(batches) for batches in ranks}) == 1
    return [batch for step in zip(*ranks) for batch in step]
