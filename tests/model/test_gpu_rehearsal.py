"""The model on rehearsed GPUs: what makes the host wait is bounded, and no device is mixed with another."""

import pytest
import torch
from gpu_rehearsal import Rehearsal, Tagged, WrongPlace, dispatch, place
from helpers import noise

from self1e.model.head import HEADS
from self1e.model.inference import masks_of
from self1e.training.adapters import adapt

TRAINING_LIMIT, PHOTO_LIMIT = 12, 14  # waits of the host, copies of what was packed included
ASKED, TOLD = ["<image>\nWhere is it?", "It is [SEG]."], ["<image>\nWhat is it?", "A thing, I think."]


def micro_batch(processor, *, masks: bool, max_tiles: int = 1) -> dict:
    """The recipe's largest: 5 photos x 3 rows; with `masks`, the last photo alone is about text."""
    encoded = []
    for photo in range(5):
        segments = masks and photo < 4
        question, answer = ASKED if segments else TOLD
        rows = [[question + " yes" * row, answer] for row in range(3)]
        size = (40 + photo, 30)
        targets = [torch.ones(int(segments), *size[::-1], dtype=torch.uint8)] * 3
        encoded.append(processor.encode(noise(60 + 60 * (photo % 2), 60, photo), rows, targets, max_tiles=max_tiles))
    return dict(processor.collate(encoded))


def as_trainer(batch: dict) -> dict:
    """As the library's Trainer hands a batch to the model: tensors moved one by one, blocking, the rest as it is."""
    batch = {name: x.to("cuda:0") if isinstance(x, torch.Tensor) else x for name, x in batch.items()}
    if "mask_targets" in batch:
        batch["mask_targets"] = [None if x is None else x.to("cuda:0") for x in batch["mask_targets"]]
    return batch


def waits(gpu: Rehearsal, title: str) -> int:
    total = sum(gpu.waits.values())
    print(f"\n{title}: {total} waits\n{gpu.table()}")
    return total


CASES = {
    "segmentation": {},
    "text alone": {"masks": False},
    "float32": {"dtype": torch.float32},
    "several grids": {"max_tiles": 4},
    "gradient checkpointing": {"checkpointing": True},
    "autocast": {"dtype": torch.float32, "autocast": True},
}


@pytest.mark.parametrize("name", CASES)
def test_a_training_micro_batch_hardly_waits(tiny_processor, load_tiny, name):
    case = {"masks": True, "max_tiles": 1, "dtype": torch.bfloat16, "checkpointing": False, "autocast": False}
    case |= CASES[name]
    model = load_tiny(dtype=case["dtype"])
    adapt(model, llm_lora=True, vision_lora=True, optimize_vision=True, r=4)
    model.to(case["dtype"]).train()
    if case["checkpointing"]:
        model.gradient_checkpointing_enable()
    batch = micro_batch(tiny_processor, masks=case["masks"], max_tiles=case["max_tiles"])
    assert len(batch["packed"].groups) == 2 or not case["masks"] or case["max_tiles"] == 1
    with Rehearsal() as gpu:
        place(model, "cuda:0")
        inputs = as_trainer(batch)
        gpu.waits.clear()
        with torch.autocast("cpu", torch.bfloat16, enabled=case["autocast"]):
            out = model(**inputs)
        out.loss.backward()
        assert waits(gpu, f"training, {name}") <= TRAINING_LIMIT
        assert all(isinstance(x.grad, Tagged) for x in model.parameters() if x.requires_grad)


@torch.no_grad()
def test_an_evaluated_photo_hardly_waits(tiny_processor, load_tiny):
    model = load_tiny(dtype=torch.bfloat16)
    rows = [["<image>\n What is x? Please output segmentation mask." + " y" * i, "[SEG]."] for i in range(3)]
    batch = dict(tiny_processor(images=[noise(60, 40)], conversations=[rows]))
    targets = torch.ones(3, 40, 60, dtype=torch.uint8)
    with Rehearsal() as gpu:
        place(model, "cuda:0")
        gpu.waits.clear()
        masks = torch.cat([one.foreground for one in masks_of(model, batch, [(40, 60)])])
        targets = targets.to(masks.device)
        pixels = torch.stack([(masks & (targets > 0)).sum((1, 2)), (masks | (targets > 0)).sum((1, 2))]).tolist()
        arrays = masks.cpu().numpy()
        assert waits(gpu, "an evaluated photo of 3 sentences") <= PHOTO_LIMIT
    assert len(pixels) == 2 and arrays.shape == (3, 40, 60)


@torch.no_grad()
@pytest.mark.parametrize("tiles", [1, 4])
def test_segment_and_chat_run(tiny_processor, load_tiny, tiles):
    model = load_tiny(dtype=torch.bfloat16)
    model.trained_head = True
    photos, prompts = [noise(60, 40), noise(130, 60, 1)], [["the ring", "the star"], ["a dog"]]
    expected = model.segment(tiny_processor, photos, prompts, max_tiles=tiles)
    with Rehearsal() as gpu:
        place(model, "cuda:0")
        gpu.waits.clear()
        found = model.segment(tiny_processor, photos, prompts, max_tiles=tiles)
        waits(gpu, f"segment, {tiles} tiles")
        reply = model.chat(tiny_processor, photos[0], "Can you segment the ring?", max_new_tokens=3)
    assert reply.text and [len(masks) for masks in found] == [2, 1]
    for ours, theirs in zip(sum(found, []), sum(expected, [])):
        assert (ours.logits == theirs.logits).all()


MAPS = {
    "LLM split": {"": "cuda:0", "model.language_model.layers.1": "cuda:1", "model.language_model.norm": "cuda:1",
                  "lm_head": "cuda:1", "segmentation_head": "cuda:1"},
    "ViT apart": {"": "cuda:1", "model.vision_tower": "cuda:0"},
    "head apart": {"": "cuda:0", "model.language_model.layers.1": "cuda:1", "model.language_model.norm": "cuda:1",
                   "lm_head": "cuda:1"},
    "embeddings apart": {"": "cuda:1", "model.language_model.embed_tokens": "cuda:0"},
}  # fmt: skip


@pytest.mark.parametrize("features", HEADS)
@pytest.mark.parametrize("plan", MAPS)
@torch.no_grad()
def test_device_maps(tiny_processor, load_tiny, features, plan):
    """Masks, losses and text of a model spread over two devices are those of one device."""
    model = load_tiny(mask_features=features)
    model.trained_head = True
    photo, batch = noise(60, 40), micro_batch(tiny_processor, masks=True)
    expected, loss = model.segment(tiny_processor, photo, ["the ring", "a dog"]), model(**batch).loss.item()
    with Rehearsal():
        dispatch(model, MAPS[plan])
        found = model.segment(tiny_processor, photo, ["the ring", "a dog"])
        assert model(**as_trainer(batch)).loss.item() == pytest.approx(loss, rel=1e-5)
        assert model.chat(tiny_processor, photo, "Can you segment the ring?", max_new_tokens=2).text
    for ours, theirs in zip(found, expected):
        torch.testing.assert_close(torch.from_numpy(ours.logits), torch.from_numpy(theirs.logits))


def test_the_rehearsal_itself(tiny_processor, load_tiny):
    """What fails on a GPU fails here, what waits is counted, and numbers are the CPU's."""
    model, batch = load_tiny(), micro_batch(tiny_processor, masks=True)
    expected = model(**batch)
    with Rehearsal() as gpu:
        x, y = torch.ones(3, device="cuda:0"), torch.ones(3)
        with pytest.raises(WrongPlace):
            x + y
        with pytest.raises(WrongPlace):
            x + torch.ones(3, device="cuda:1")
        with pytest.raises(WrongPlace):
            y[x.long()]
        with pytest.raises(TypeError, match="numpy"):
            x.numpy()
        counted = {"bool(x.any())": lambda: bool(x.any()), "x[x > 0]": lambda: x[x > 0], "tolist": x.tolist,
                   "cpu": x.cpu, "to": lambda: y.to("cuda:0"), "nonzero": x.nonzero}  # fmt: skip
        for title, call in counted.items():
            gpu.waits.clear()
            call()
            assert sum(gpu.waits.values()) >= 1, title
        gpu.waits.clear()
        assert x.device == torch.device("cuda", 0) and (x + 1).is_cuda and (x * y.sum()).device == x.device
        assert not gpu.waits
        place(model, "cuda:0")
        inputs = as_trainer(batch)
        with pytest.raises((WrongPlace, RuntimeError)):
            model(**inputs | {"pixel_values": batch["pixel_values"]})
        out = model(**inputs)
        torch.testing.assert_close(out.loss.detach().cpu(), expected.loss.detach())
        for ours, theirs in zip(out.mask_logits, expected.mask_logits):
            torch.testing.assert_close(ours.detach().cpu(), theirs.detach())
