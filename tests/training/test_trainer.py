"""The Trainer's parts without a training run: stream, batches, log lines, lists."""

import errno

import pytest

from self1e.training.checkpoint import checkpoints_in
from self1e.training.stream import (
    broken_list,
)
from self1e.training.trainer import cannot_write, log_line


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
