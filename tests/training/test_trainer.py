"""The Trainer's parts without a training run: stream, batches, log lines, lists."""

import errno

import numpy as np
import pytest
import torch
from helpers import noise

from self1e.data.mixture import Group, Mixture
from self1e.data.samples import Sample, SampleError
from self1e.training.checkpoint import checkpoints_in
from self1e.training.stream import (
    Collate,
    Encode,
    MicroBatches,
    Stream,
    TooManyBroken,
    broken_list,
)
from self1e.training.trainer import cannot_write, log_line


class Numbers:
    """A training set of `size` numbered samples; those in `broken` cannot be read."""

    def __init__(self, name: str, size: int, broken=()):
        self.name, self.size, self.broken, self.cap = name, size, broken, None

    def __len__(self):
        return self.size

    def sample(self, index, rng):
        if self.broken == "all" or index in self.broken:
            raise SampleError(f"{self.name}/{index}", "torn")
        image = noise(20, 12, seed=index)
        return Sample(f"{self.name}/{index}", image, [["<image>\nit?", "[SEG]."]], [np.ones((1, 12, 20), np.uint8)])


def mixture(*sets, batch_size=2, mode="exact", transform=None):
    return Mixture(
        [Group(list(sets), 1, True, redraw=False)], batch_size=batch_size, seed=0, mode=mode, transform=transform
    )


@pytest.mark.parametrize("size", [12, 13])
def test_ranks_share_the_plan_and_nothing_twice(size):
    plan = mixture(Numbers("a", size))
    ranks = [MicroBatches(plan, rank=rank, world_size=2) for rank in range(2)]
    assert len(ranks[0]) == len(ranks[1]) == -(-size // 4)
    read = [[place for batch in rank for place in batch] for rank in ranks]
    assert not set(read[0]) & set(read[1])
    alone = [place for batch in MicroBatches(plan, rank=0, world_size=1) for place in batch]
    assert sorted(read[0] + read[1]) == sorted(alone) and len(set(alone)) == size


def test_epochs_differ_repeat_and_can_be_shortened_or_passed_over():
    plan = mixture(Numbers("a", 12))
    batches = MicroBatches(plan, rank=0, world_size=1)
    first = list(batches)
    assert list(batches) == first
    batches.set_epoch(1)
    second = list(batches)
    assert second != first
    assert list(MicroBatches(plan, rank=0, world_size=1, first_epoch=1)) == second
    short = MicroBatches(plan, rank=0, world_size=1, limit=2)
    assert len(short) == 2 and list(short) == first[:2]


def test_batches_name_their_samples_and_the_broken_ones_they_replace(tiny_processor):
    encode = Encode(tiny_processor, max_length=512, max_tiles=1)
    stream = Stream(mixture(Numbers("a", 12, broken=(3,)), transform=encode))
    items = [stream[place] for batch in MicroBatches(stream.mixture, rank=0, world_size=1) for place in batch]
    batch = Collate(tiny_processor)(items)
    assert len(batch["ids"]) == 12 and "a/3" not in batch["ids"]
    assert batch["replaced"] == [("a/3", "torn")]
    assert batch["input_ids"].shape[0] == 12 and len(batch["mask_targets"]) == 12
    assert isinstance(batch["labels"], torch.Tensor)


def test_a_row_too_long_counts_as_broken(tiny_processor):
    sample = Numbers("a", 1).sample(0, None)
    with pytest.raises(SampleError, match="a/0.*--model_max_length 10"):
        Encode(tiny_processor, max_length=10, max_tiles=1)(sample)


def test_a_set_that_is_broken_throughout_says_so(tiny_processor):
    stream = Stream(mixture(Numbers("a", 12, broken="all")))
    item = stream[next(iter(MicroBatches(stream.mixture, rank=0, world_size=1)))[0]]
    assert isinstance(item, TooManyBroken) and "a/" in str(item) and "torn" in str(item)
    assert Collate(tiny_processor)([item, item]) == {"failed": item}


def test_lists_are_short_and_counted():
    assert broken_list([("a/1", "x"), ("b/2", "y"), ("a/1", "x")]) == "  2 x a/1: x\n  1 x b/2: y"
    many = broken_list([(f"a/{i}", "x") for i in range(50)]).splitlines()
    assert len(many) == 31 and many[-1].strip() == "and 20 more"


def test_only_whole_checkpoints_count(tmp_path):
    for name in ("checkpoint-20", "checkpoint-3", "checkpoint-x", "partial"):
        (tmp_path / name).mkdir()
    assert [path.name for path in checkpoints_in(tmp_path)] == ["checkpoint-3", "checkpoint-20"]


def test_log_lines_fit_a_terminal():
    logs = {"loss": 9.2455, "ce": 6.0751, "mask_bce": 1.213, "mask_dice": 1.4887, "grad_norm": 3.276, "epoch": 0.074}
    logs |= {"lr_llm": 1e-6, "lr_vision_and_head": 2e-6, "samples_per_second": 8.1, "broken_samples": 0}
    line = log_line(1, logs)
    assert line == (
        "step 1  epoch 0.074  loss 9.2455 (ce 6.0751, bce 1.2130, dice 1.4887)  grad norm 3.276  "
        "lr llm 1.00e-06, vision_and_head 2.00e-06  8.1 samples/s"
    )
    assert log_line(1, logs | {"broken_samples": 2}).endswith("2 broken samples")
    assert "grad norm" not in log_line(1, {key: value for key, value in logs.items() if key != "grad_norm"})
    scores = {"eval_ReasonSeg|val_giou": 0.5, "eval_ReasonSeg|val_ciou": 0.25, "epoch": 1.0}
    assert log_line(2, scores) == "step 2  epoch 1.000  validation:  ReasonSeg val gIoU 50.0%, cIoU 25.0%"
    times = {"train_runtime": 1200.4, "train_samples_per_second": 15.02, "train_loss": 1.0, "epoch": 2.0}
    assert "trained for 1,200 s, validations included, at 15.0 samples/s" in log_line(9, times)


@pytest.mark.parametrize(
    ("error", "disk"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), True),
        (RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed"), True),
        (RuntimeError("The size of tensor a (3) must match the size of tensor b (4)"), False),
        (OSError(errno.ENOTCONN, "the socket is gone"), False),
    ],
)
def test_only_an_error_of_the_disk_counts_as_a_full_one(error, disk):
    assert cannot_write(error) == disk
