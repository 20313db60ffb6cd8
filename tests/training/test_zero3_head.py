"""Under ZeRO-3 on two CPU ranks, the head gets the gradients of one process, whatever each rank has to segment."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import ROOT, noise

from self1e import Self1EForSegmentation, Self1EProcessor

LAUNCHER = Path(sys.executable).with_name("deepspeed")
pytestmark = pytest.mark.skipif(not LAUNCHER.is_file(), reason="deepspeed is not installed beside this python")

PROGRAM = """
import faulthandler, sys, torch, deepspeed
faulthandler.dump_traceback_later(100, exit=True)
from deepspeed.utils import safe_get_full_grad
from test_zero3_head import load, micro_batch
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # it would be compiled
deepspeed.init_distributed("gloo", auto_mpi_discovery=False)
version, out, checkpointing = sys.argv[-3:]
model, processor = load(version, int(checkpointing))
model.set_zero3_leaf()
config = {"train_micro_batch_size_per_gpu": 1, "zero_allow_untested_optimizer": True}
config["zero_optimization"] = {"stage": 3, "stage3_param_persistence_threshold": 0}
engine, *_ = deepspeed.initialize(model=model, config=config, optimizer=torch.optim.SGD(model.parameters(), lr=0.0))
rank = torch.distributed.get_rank()
for step in range(2):  # the second with the plan of the first
    loss = engine(**micro_batch(processor, rank, groups=1)).loss
    engine.backward(loss)
    gradients = {name: safe_get_full_grad(x).clone() for name, x in model.named_parameters()}
    engine.step()
if rank == 0:
    torch.save(gradients, out)
torch.distributed.barrier()
torch.distributed.destroy_process_group()
"""


def load(version, checkpointing: int):
    model = Self1EForSegmentation.from_pretrained(version).train()
    generator = torch.Generator().manual_seed(0)
    for parameter in model.segmentation_head.parameters():
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model, Self1EProcessor.from_pretrained(version)


def micro_batch(processor, rank: int, **options) -> dict:
    """Rank 0: two images of one and of two tiles, three masks. Rank 1: an image of four tiles and no mask."""
    if rank:
        encoded = [processor.encode(noise(112, 112, 2), [["<image>\nhow many?", "two"]], max_tiles=4)]
    else:
        several = [["<image>\nthe cat", "[SEG] and [SEG]."], ["<image>\nwhat?", "a thing, I think"]]
        masks = [torch.ones(2, 20, 30, dtype=torch.uint8), None]
        encoded = [processor.encode(noise(112, 56, 0), several, masks, max_tiles=4)]
        encoded += [
            processor.encode(noise(56, 56, 1), [["<image>\nit", "[SEG]."]], [torch.ones(1, 9, 9, dtype=torch.uint8)])
        ]
    return dict(processor.collate(encoded, **options))


@pytest.mark.parametrize("checkpointing", [0, 1])
def test_gradients_are_those_of_one_process(tiny_version, tmp_path, checkpointing):
    (tmp_path / "program.py").write_text(PROGRAM)
    command = [LAUNCHER, "--num_accelerators", "2", tmp_path / "program.py"]
    environment = os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = ":".join(map(str, [Path(__file__).parent, Path(__file__).parents[1], ROOT]))
    done = subprocess.run(
        [*map(str, command), str(tiny_version), str(tmp_path / "gradients"), str(checkpointing)],
        env=environment, capture_output=True, text=True, timeout=200, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    found = torch.load(tmp_path / "gradients", weights_only=True)
    model, processor = load(tiny_version, 0)
    sum(model(**micro_batch(processor, rank)).loss for rank in range(2)).div(2).backward()  # ranks are averaged
    expected = {name: x.grad for name, x in model.named_parameters()}
    assert found.keys() == expected.keys() and any("f_out" in name for name in found)
    for name, gradient in expected.items():
        torch.testing.assert_close(
            found[name], gradient, rtol=1e-3, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}"
        )
