"""The model on GPUs: no devices are mixed, and the host hardly waits. On a CPU, by fake tensors.

A fake tensor has a shape and a device, and no values. An operation over two devices fails, and so does reading a
value, for which the host would wait for the GPU.
"""

from unittest.mock import patch

import pytest
import torch
from accelerate.hooks import attach_align_device_hook_on_blocks
from helpers import noise
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensor, FakeTensorMode
from torch.utils._pytree import tree_map_only

from self1e.model.batch import Packed
from self1e.model.head import HEADS


def fakes_are_indexed() -> bool:
    """Whether this torch can index a fake tensor of a GPU that is not there."""
    try:
        with FakeTensorMode():
            return torch.zeros(1).to("cuda")[0].ndim == 0
    except RuntimeError:
        return False


pytestmark = pytest.mark.skipif(not fakes_are_indexed(), reason="torch before 2.9 asks the driver for the GPU")
ASKED, ANSWERED = ["<image>\nWhere is it?", "It is [SEG]."], ["<image>\nWhat is it?", "A thing, I think."]


def micro_batch(processor, *, masks: bool = True, max_tiles: int = 1) -> dict:
    """5 images x 3 conversations in host memory; with `masks`, the last image alone is about text."""
    encoded = []
    for number in range(5):
        question, answer = ASKED if masks and number < 4 else ANSWERED
        conversations = [[question + " yes" * more, answer] for more in range(3)]
        targets = [torch.ones(answer.count("[SEG]"), 30, 40 + number, dtype=torch.uint8)] * 3
        image = noise(60 + 60 * (number % 2), 60, number)
        encoded.append(processor.encode(image, conversations, targets, max_tiles=max_tiles))
    return dict(processor.collate(encoded, groups=2))


def fake(batch: dict, mode: FakeTensorMode, device: str) -> dict:
    """The batch without its values, on a device as training hands it over; what was packed is in host memory."""
    packed = Packed(*(mode.from_tensor(x) if isinstance(x, torch.Tensor) else x for x in batch["packed"]))
    with mode:
        return tree_map_only(torch.Tensor, lambda x: mode.from_tensor(x).to(device), batch) | {"packed": packed}


def device_of(name: str, plan: dict[str, str]) -> str:
    """That of the longest prefix."""
    return plan[max((prefix for prefix in plan if f"{name}.".startswith(f"{prefix}.") or not prefix), key=len)]


def spread(model, mode: FakeTensorMode, plan: dict[str, str]) -> None:
    """Put the model's weights on devices, without values, with the hooks that accelerate has for `device_map=plan`."""
    moved: dict[int, FakeTensor] = {}
    for prefix, module in model.named_modules():
        for store in (module._parameters, module._buffers):
            for name, x in store.items():
                if x is not None:
                    device = torch.device(device_of(f"{prefix}.{name}", plan))
                    store[name] = moved.setdefault(id(x), FakeTensor(mode, x.to("meta"), device))
    if len(plan) > 1:
        names = [name for name, _ in model.named_modules() if name]
        whole = [name for name in names if not any(prefix.startswith(f"{name}.") for prefix in plan)]
        blocks = {name: device_of(name, plan) for name in whole if name in plan or name.count(".") < 4}
        with patch("accelerate.hooks.set_module_tensor_to_device"):  # they are where they belong
            attach_align_device_hook_on_blocks(
                model, execution_device={"": plan[""], **blocks}, offload=dict.fromkeys(blocks, False),
                skip_keys=model._skip_keys_device_placement,
            )  # fmt: skip


MAPS = {
    "one device": {"": "cuda:0"},
    "LLM split": {"": "cuda:0", "model.language_model.layers.1": "cuda:1", "model.language_model.norm": "cuda:1",
                  "lm_head": "cuda:1", "segmentation_head": "cuda:1"},
    "ViT apart": {"": "cuda:1", "model.vision_tower": "cuda:0"},
    "head apart": {"": "cuda:0", "model.language_model.layers.1": "cuda:1", "model.language_model.norm": "cuda:1",
                   "lm_head": "cuda:1"},
    "embeddings apart": {"": "cuda:1", "model.language_model.embed_tokens": "cuda:0"},
}  # fmt: skip


CASES = [*((plan, "rfa") for plan in MAPS), *(("head apart", features) for features in HEADS if features != "rfa")]


@pytest.mark.parametrize(("plan", "features"), CASES)
@torch.no_grad()
def test_losses_and_masks_mix_no_devices_and_read_no_values(tiny_processor, load_tiny, features, plan):
    model, mode = load_tiny(mask_features=features).train(), FakeTensorMode()
    batches = [micro_batch(tiny_processor, max_tiles=4), micro_batch(tiny_processor, masks=False)]
    spread(model, mode, MAPS[plan])
    for batch in batches:
        given = fake(batch, mode, MAPS[plan][""])
        with mode:
            out = model(**given)
        assert out.loss.shape == () and len(out.mask_logits) == 15
        with mode, pytest.raises(DataDependentOutputException):
            out.loss.item()
