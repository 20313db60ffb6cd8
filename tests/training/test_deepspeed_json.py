"""DeepSpeed JSONs: ours are read, and one that would train something else than the flags say is refused."""

import json
from pathlib import Path

import pytest
from helpers import ROOT, read_json

from self1e.errors import UserError
from self1e.training.args import offloads, read_deepspeed

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
        ({"optimizer": {"type": "SGD"}}, "remove 'optimizer'"),
        ({"scheduler": {"type": "WarmupLR"}}, "remove 'scheduler'"),
        ({"train_batch_size": 7}, "remove 'train_batch_size'"),
        ({"gradient_clipping": 0.5}, "remove 'gradient_clipping'"),
        ({"fp16": {"enabled": True}}, "remove 'fp16'"),
        ({"zero_optimization": {"stage": 2, **OFFLOAD}}, "offloading is for stage 3 here"),
    ],
)
def test_what_would_be_honoured_by_half_is_refused(tmp_path: Path, changes, says):
    path = tmp_path / "own.json"
    path.write_text(json.dumps(read_json(ROOT / "configs/zero2.json") | changes))
    with pytest.raises(UserError, match=says) as refusal:
        read_deepspeed(path)
    assert str(path) in str(refusal.value)
