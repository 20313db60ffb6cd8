"""DeepSpeed JSONs: ours are read, and one that would train something else than the flags say is refused."""

import json
from argparse import Namespace
from pathlib import Path

import pytest
from helpers import ROOT, read_json

from self1e.errors import UserError
from self1e.training.args import fill, offloads, read_deepspeed

OFFLOAD = {"offload_optimizer": {"device": "cpu"}}


@pytest.mark.parametrize(
    ("name", "stage", "offloaded"), [("zero2", 2, False), ("zero3", 3, False), ("zero3_offload", 3, True)]
)
def test_our_own_files_are_read(name, stage, offloaded):
    values = read_deepspeed(ROOT / "configs" / f"{name}.json")
    assert values["zero_optimization"]["stage"] == stage
    assert offloads(values, "offload_optimizer") == offloads(values, "offload_param") == offloaded
    assert values["data_types"] == {"grad_accum_dtype": "fp32"}  # bf16 sums of many micro-batches lose digits


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"optimizer": {"type": "SGD"}}, "remove the section 'optimizer'"),
        ({"scheduler": {"type": "WarmupLR"}}, "remove the section 'scheduler'"),
        ({"zero_optimization": {"stage": 2, **OFFLOAD}}, "offloading is for stage 3 here"),
    ],
)
def test_what_would_be_honoured_by_half_is_refused(tmp_path: Path, changes, says):
    path = tmp_path / "own.json"
    path.write_text(json.dumps(read_json(ROOT / "configs/zero2.json") | changes))
    with pytest.raises(UserError, match=says) as refusal:
        read_deepspeed(path)
    assert str(path) in str(refusal.value)


def test_automatic_entries_are_filled_from_the_flags_and_contradictions_are_refused(tmp_path: Path):
    args = Namespace(deepspeed="own.json", batch_size=3, grad_accumulation_steps=4, precision="bf16")
    values = read_deepspeed(ROOT / "configs/zero2.json")
    filled = fill(values, args, ranks=2, clip=1.0)
    assert (filled["train_batch_size"], filled["gradient_accumulation_steps"]) == (24, 4)
    assert (filled["train_micro_batch_size_per_gpu"], filled["gradient_clipping"]) == (3, 1.0)
    for change in ({"train_batch_size": 7}, {"gradient_clipping": 0.5}, {"fp16": {"enabled": True}}):
        with pytest.raises(UserError, match="own.json"):
            fill(values | change, args, ranks=2, clip=1.0)
