"""Under ZeRO-3 on two CPU ranks, the head gets the gradients of one process, whatever each rank has to segment."""

import faulthandler

import pytest
import torch
from helpers import noise
from runs import LAUNCHER, as_ranks, exit_codes

from self1e import Self1EForSegmentation, Self1EProcessor

pytestmark = pytest.mark.skipif(not LAUNCHER.is_file(), reason="deepspeed is not installed beside this python")


def save_gradients(version, out, checkpointing: bool) -> None:
    """What a rank does: two steps under ZeRO-3, the second with the plan of the first."""
    import deepspeed
    from deepspeed.utils import safe_get_full_grad, set_z3_leaf_modules

    faulthandler.dump_traceback_later(100, exit=True)
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # it would be compiled
    deepspeed.init_distributed("gloo", auto_mpi_discovery=False)
    model, processor = load(version, checkpointing)
    set_z3_leaf_modules(model, [type(model.segmentation_head)])
    config = {"train_micro_batch_size_per_gpu": 1, "zero_allow_untested_optimizer": True}
    config["zero_optimization"] = {"stage": 3, "stage3_param_persistence_threshold": 0}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    engine, *_ = deepspeed.initialize(model=model, config=config, optimizer=optimizer)
    rank = torch.distributed.get_rank()
    for _ in range(2):
        loss = engine(**micro_batch(processor, rank, groups=1)).loss
        engine.backward(loss)
        gradients = {name: safe_get_full_grad(x).clone() for name, x in model.named_parameters()}
        engine.step()
    if rank == 0:
        torch.save(gradients, out)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def load(version, checkpointing: bool):
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


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_are_those_of_one_process(tiny_version, tmp_path, checkpointing):
    ranks = as_ranks(save_gradients, tiny_version, tmp_path / "gradients", checkpointing, printed=tmp_path / "printed")
    assert exit_codes(*ranks) == [0, 0], (tmp_path / "printed.0.txt").read_text()[-3000:]
    found = torch.load(tmp_path / "gradients", weights_only=True)
    model, processor = load(tiny_version, False)
    sum(model(**micro_batch(processor, rank)).loss for rank in range(2)).div(2).backward()  # ranks are averaged
    expected = {name: x.grad for name, x in model.named_parameters()}
    assert found.keys() == expected.keys() and any("f_out" in name for name in found)
    for name, gradient in expected.items():
        torch.testing.assert_close(
            found[name], gradient, rtol=1e-3, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}"
        )
