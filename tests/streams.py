"""Sets of numbers and plans of them, for tests of the training stream."""

import numpy as np

from self1e.data.samples import Sample, TrainingSet
from self1e.errors import UserError


class Numbers(TrainingSet):
    """A set whose sample k has the id "<name>/<k>" and one random number as its conversation.

    broken: numbers of samples that cannot be read
    empty:  numbers of samples without a usable label
    """

    def __init__(self, name, size, broken=(), cap=None, empty=(), segmentation=True, redrawn=False):
        self.name, self.size, self.broken, self.cap, self.empty = name, size, set(broken), cap, set(empty)
        self.segmentation, self.redrawn = segmentation, redrawn

    def open(self):
        pass

    def __len__(self):
        return self.size

    def file_name(self, index):
        return str(index)

    def image_keys(self):
        return np.arange(self.size)

    def read(self, index, rng):
        if index in self.broken:
            raise UserError("torn")
        if index in self.empty:
            return None
        mask = np.zeros((0, 1, 1), np.uint8)
        return Sample(f"{self.name}/{index}", None, [[str(rng.integers(1 << 40))]], [mask])


def ids(mixture, places):
    return [f"{mixture.sets[number].data.name}/{item}" for _, number, item, _ in places]


def epoch_batches(mixture, world=1, epoch=0):
    ranks = [mixture.micro_batches(epoch, rank=rank, world_size=world) for rank in range(world)]
    assert len({len(batches) for batches in ranks}) == 1
    return [batch for step in zip(*ranks) for batch in step]
