"""Agreement with the published implementation, in float32 on a CPU, on golden outputs (tests/golden/README.md)."""

import json
import re
from dataclasses import dataclass
from functools import cache, reduce
from itertools import groupby
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import PACKS, each_pack
from PIL import Image
from timm.layers import DropPath
from transformers.core_model_loading import WeightRenaming

from self1e import Self1EForSegmentation, Self1EProcessor
from self1e.model.attention import perception_mask
from self1e.model.weights import published_names


@dataclass(frozen=True)
class Case:
    """A recorded batch of a pack."""

    pack: Path
    record: dict

    def __str__(self) -> str:
        return f"{self.pack.name}-{self.record['name']}"


@cache
def record(pack: Path) -> dict:
    return json.loads((pack / "cases.json").read_text(encoding="utf-8"))


CASES = [Case(pack, case) for pack in PACKS for case in record(pack)["cases"]]
TRAINING = [case for case in CASES if case.record["kind"] == "train"]
each_case = pytest.mark.parametrize("case", CASES, ids=str)


@cache
def processor(pack: Path) -> Self1EProcessor:
    return Self1EProcessor.from_pretrained(pack / "base_internvl_chat")


def fresh_model(pack: Path) -> Self1EForSegmentation:
    folders = pack / "base_internvl_chat", pack / "trained_self1e"
    return Self1EForSegmentation.from_pretrained(folders[0], weights=folders[1], dtype=torch.float32)


@cache
def base_of(pack: Path) -> Self1EForSegmentation:
    """What has nothing to do with the head is compared without the trained one, whose shape an edit may change."""
    return Self1EForSegmentation.from_pretrained(pack / "base_internvl_chat", dtype=torch.float32)


@cache
def model_of(pack: Path) -> Self1EForSegmentation:
    """Shared by tests that leave it as it was."""
    return fresh_model(pack)


def unpack(bits: np.ndarray, shape: np.ndarray) -> np.ndarray:
    """Bits along the last axis -> uint8 of that shape."""
    return np.unpackbits(bits, axis=-1, count=int(shape[-1])).reshape(shape)


def read(case: Case) -> tuple[dict, dict]:
    """The golden arrays of a case, and our batch for it; neighbouring conversations of one photo are one image."""
    golden = dict(np.load(case.pack / f"{case.record['name']}.npz"))
    images, conversations, targets = [], [], []
    for photo, group in groupby(enumerate(case.record["rows"]), key=lambda item: item[1]["photo"]):
        group = list(group)
        images.append(Image.open(case.pack / "photos" / photo))
        conversations.append([one["conversation"] for _, one in group])
        bits = [golden.get(f"mask_target_bits_{i}") for i, _ in group]
        targets.append(
            [None if x is None else unpack(x, golden[f"mask_target_shape_{i}"]) for x, (i, _) in zip(bits, group)]
        )
    return golden, processor(case.pack)(images, conversations, targets if case in TRAINING else None)


def unpadded(batch: dict) -> list[int]:
    return batch["attention_mask"].sum(1).tolist()


@each_case
def test_pixels_are_the_same(case):
    golden, batch = read(case)
    found = batch["pixel_values"][:, :, ::16, ::16].numpy()
    tiles = batch["tile_grids"].prod(1).tolist()
    per_image = np.split(found, np.cumsum(tiles)[:-1])
    per_conversation = np.concatenate([per_image[image] for image in batch["row_image"].tolist()])
    assert np.array_equal(per_conversation, golden["pixel_values_every_16"])


@each_case
def test_ids_labels_and_positions_are_the_same(case):
    golden, batch = read(case)
    model, seen = base_of(case.pack), []
    hook = model.model.language_model.rotary_emb.register_forward_hook(
        lambda module, args, kwargs, out: seen.append(kwargs.get("position_ids", args[-1] if args else None)),
        with_kwargs=True,
    )
    with torch.no_grad():
        model.eval()(**batch)
    hook.remove()
    whole = max(seen, key=lambda found: found.shape[1])  # conversations go through the LLM in groups of similar length
    assert all(torch.equal(found, whole[:1, : found.shape[1]].expand_as(found)) for found in seen)
    positions = whole[:1].expand(len(batch["input_ids"]), -1)
    for i, n in enumerate(unpadded(batch)):
        assert np.array_equal(batch["input_ids"][i, :n], golden["input_ids"][i, :n])
        assert np.array_equal(batch["labels"][i, :n], golden["labels"][i, :n])
        assert np.array_equal(positions[i, :n], golden["position_ids"][i, :n])
        assert golden["input_ids"].shape[1] == n or not golden["input_ids"][i, n:].any()  # published padding, id 0


@each_case
def test_attention_is_the_same(case):
    """Every unpadded query and key."""
    golden, batch = read(case)
    config = base_of(case.pack).config
    ids, padding = batch["input_ids"], batch["attention_mask"]
    embeds, length = torch.zeros(*ids.shape, 1), ids.shape[1]
    mask = perception_mask(config.attention_pathway, config, ids, embeds=embeds, padding_mask=padding)
    allowed = torch.ones(1, 1, length, length).tril().bool() if mask is None else mask
    allowed = allowed.expand(len(batch["input_ids"]), -1, -1, -1)
    expected = unpack(golden["attention_allowed_bits"], golden["attention_shape"]).astype(bool)
    for i, n in enumerate(unpadded(batch)):
        assert np.array_equal(allowed[i, 0, :n, :n], expected[i, 0, :n, :n])
        assert not allowed[i, 0, :n, n:].any()


@each_case
@torch.no_grad()
def test_mask_logits_agree_to_1e4(case):
    golden, batch = read(case)
    found = model_of(case.pack).eval()(**batch).mask_logits
    with_masks = [i for i, logits in enumerate(found) if len(logits)]
    assert with_masks == [i for i in range(len(found)) if golden.get(f"mask_logits_{i}", np.zeros(0)).size]
    for i in with_masks:
        assert found[i].shape == golden[f"mask_logits_{i}"].shape
        assert np.abs(found[i].numpy() - golden[f"mask_logits_{i}"]).max() <= 1e-4


def without_noise(model: Self1EForSegmentation) -> Self1EForSegmentation:
    """Training mode with neither dropout nor stochastic depth, as recorded."""
    for layer in model.train().modules():
        if isinstance(layer, torch.nn.Dropout | DropPath):
            layer.eval()
    return model


@pytest.mark.parametrize("case", TRAINING, ids=str)
def test_losses_and_gradients_agree(case):
    """Losses to 1e-4, the gradient's norm of every parameter to 1e-3, relative."""
    _, batch = read(case)
    model = model_of(case.pack)
    out = without_noise(model)(**batch)
    expected = case.record["losses"]
    assert out.loss.item() == pytest.approx(expected["loss"], rel=1e-4)
    for name, theirs in (("ce", "ce_loss"), ("mask_bce", "mask_bce_loss"), ("mask_dice", "mask_dice_loss")):
        assert out.losses[name].item() == pytest.approx(expected[theirs], rel=1e-4)
    model.zero_grad()
    out.loss.backward()
    norms = gradient_norms(model)
    assert norms.keys() == case.record["grad_norm"].keys()
    # Gradients that are 0 but for rounding (an attention's key bias) have no relative error.
    tiny = 1e-7 * max(case.record["grad_norm"].values())
    assert norms == pytest.approx(case.record["grad_norm"], rel=1e-3, abs=tiny)
    model.zero_grad()


def gradient_norms(model: Self1EForSegmentation) -> dict[str, float]:
    """By published name; q, k and v of the ViT together, as their fused tensor."""
    renamings = [x.reverse_transform() for x in reversed(published_names()) if isinstance(x, WeightRenaming)]
    squares: dict[str, float] = {}
    for name, parameter in model.named_parameters():
        fused = re.sub(r"(?<=vision_tower)(.*)\.attention\.[qkv]_proj", r"\1.attn.qkv", name)
        name = reduce(lambda key, renaming: renaming.rename_source_key(key)[0], renamings, fused)
        squares[name] = squares.get(name, 0.0) + parameter.grad.double().square().sum().item()
    return {name: value**0.5 for name, value in squares.items()}


@each_pack
def test_eight_adamw_steps_agree(pack):
    """The recipe of the record, at its top level; losses to 1e-3 relative."""
    run = record(pack)["adamw_run"]
    _, batch = read(next(case for case in CASES if case.pack == pack and case.record["name"] == run["batch"]))
    model = without_noise(fresh_model(pack))
    recipe = {"lr": run["lr"], "betas": run["betas"], "weight_decay": run["weight_decay"]}
    optimizer = torch.optim.AdamW(model.parameters(), **recipe)
    assert len(run["losses"]) == 8
    for expected in run["losses"]:
        loss = model(**batch).loss
        assert loss.item() == pytest.approx(expected["loss"], rel=1e-3)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), run["clip_norm"])
        optimizer.step()
