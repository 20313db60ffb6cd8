"""Agreement with the published implementation, in float32 on a CPU, on golden outputs (README beside them)."""

import json
import re
from functools import cache
from itertools import groupby

import numpy as np
import pytest
import torch
from helpers import SHARED, needs_shared
from PIL import Image
from timm.layers import DropPath
from transformers.core_model_loading import WeightRenaming, apply_renamings

from self1e import Self1EForSegmentation, Self1EProcessor
from self1e.model.attention import perception_mask
from self1e.model.checkpoints import published_names

GOLDEN = SHARED / "golden" / "model"
RECORD = json.loads((GOLDEN / "cases.json").read_text(encoding="utf-8")) if SHARED.is_dir() else {"cases": []}
CASES = {case["name"]: case for case in RECORD["cases"]}

pytestmark = needs_shared


@cache
def processor() -> Self1EProcessor:
    return Self1EProcessor.from_pretrained(GOLDEN / "base_internvl_chat")


def fresh_model() -> Self1EForSegmentation:
    folders = GOLDEN / "base_internvl_chat", GOLDEN / "trained_self1e"
    return Self1EForSegmentation.from_pretrained(folders[0], weights=folders[1], dtype=torch.float32)


@pytest.fixture(scope="module")
def model() -> Self1EForSegmentation:
    return fresh_model()


def unpack(bits: np.ndarray, shape: np.ndarray) -> np.ndarray:
    """Bits along the last axis -> uint8 of that shape."""
    return np.unpackbits(bits, axis=-1, count=int(shape[-1])).reshape(shape)


def read(name: str) -> tuple[dict, dict, dict]:
    """A case, its golden arrays, and our batch for it; neighbouring rows of one photo are one image."""
    case, golden = CASES[name], dict(np.load(GOLDEN / f"{name}.npz"))
    images, conversations, targets = [], [], []
    for photo, rows in groupby(enumerate(case["rows"]), key=lambda item: item[1]["photo"]):
        rows = list(rows)
        images.append(Image.open(GOLDEN / "photos" / photo))
        conversations.append([row["conversation"] for _, row in rows])
        bits = [golden.get(f"mask_target_bits_{i}") for i, _ in rows]
        targets.append(
            [None if x is None else unpack(x, golden[f"mask_target_shape_{i}"]) for x, (i, _) in zip(bits, rows)]
        )
    return case, golden, processor()(images, conversations, targets if case["kind"] == "train" else None)


def unpadded(batch: dict) -> list[int]:
    return batch["attention_mask"].sum(1).tolist()


@pytest.mark.parametrize("name", CASES)
def test_pixels_are_the_same(name):
    _, golden, batch = read(name)
    found = batch["pixel_values"][:, :, ::16, ::16].numpy()
    tiles = batch["tile_grids"].prod(1).tolist()
    per_image = np.split(found, np.cumsum(tiles)[:-1])
    per_row = np.concatenate([per_image[image] for image in batch["row_image"].tolist()])
    assert np.array_equal(per_row, golden["pixel_values_every_16"])


@pytest.mark.parametrize("name", CASES)
def test_ids_labels_and_positions_are_the_same(name, model):
    _, golden, batch = read(name)
    seen = []
    hook = model.model.language_model.rotary_emb.register_forward_hook(
        lambda module, args, kwargs, out: seen.append(kwargs.get("position_ids", args[-1] if args else None)),
        with_kwargs=True,
    )
    with torch.no_grad():
        model.eval()(**batch)
    hook.remove()
    positions = seen[0].expand(len(batch["input_ids"]), -1)
    for row, n in enumerate(unpadded(batch)):
        assert np.array_equal(batch["input_ids"][row, :n], golden["input_ids"][row, :n])
        assert np.array_equal(batch["labels"][row, :n], golden["labels"][row, :n])
        assert np.array_equal(positions[row, :n], golden["position_ids"][row, :n])
        assert golden["input_ids"].shape[1] == n or not golden["input_ids"][row, n:].any()  # published padding, id 0


@pytest.mark.parametrize("name", CASES)
def test_attention_is_the_same(name, model):
    """Every unpadded query and key."""
    _, golden, batch = read(name)
    mask = perception_mask(
        model.config.attention_pathway,
        config=model.config.text_config,
        embeds=torch.zeros(*batch["input_ids"].shape, 1),
        padding_mask=batch["attention_mask"],
        is_image=batch["input_ids"] == model.config.image_token_id,
        is_seg=batch["input_ids"] == model.config.seg_token_id,
    )
    length = batch["input_ids"].shape[1]
    allowed = torch.ones(1, 1, length, length).tril().bool() if mask is None else mask
    allowed = allowed.expand(len(batch["input_ids"]), -1, -1, -1)
    expected = unpack(golden["attention_allowed_bits"], golden["attention_shape"]).astype(bool)
    for row, n in enumerate(unpadded(batch)):
        assert np.array_equal(allowed[row, 0, :n, :n], expected[row, 0, :n, :n])
        assert not allowed[row, 0, :n, n:].any()


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_mask_logits_agree_to_1e4(name, model):
    _, golden, batch = read(name)
    found = model.eval()(**batch).mask_logits
    rows_with_masks = [i for i, logits in enumerate(found) if len(logits)]
    assert rows_with_masks == [i for i in range(len(found)) if golden.get(f"mask_logits_{i}", np.zeros(0)).size]
    for i in rows_with_masks:
        assert found[i].shape == golden[f"mask_logits_{i}"].shape
        assert np.abs(found[i].numpy() - golden[f"mask_logits_{i}"]).max() <= 1e-4


def without_noise(model: Self1EForSegmentation) -> Self1EForSegmentation:
    """Training mode with neither dropout nor stochastic depth, as recorded."""
    for layer in model.train().modules():
        if isinstance(layer, torch.nn.Dropout | DropPath):
            layer.eval()
    return model


TRAINING = [name for name, case in CASES.items() if case["kind"] == "train"]


@pytest.mark.parametrize("name", TRAINING)
def test_losses_and_gradients_agree(name, model):
    """Losses to 1e-4, the gradient's norm of every parameter to 1e-3, relative."""
    case, _, batch = read(name)
    out = without_noise(model)(**batch)
    expected = case["losses"]
    assert out.loss.item() == pytest.approx(expected["loss"], rel=1e-4)
    for name, theirs in (("ce", "ce_loss"), ("mask_bce", "mask_bce_loss"), ("mask_dice", "mask_dice_loss")):
        assert out.losses[name].item() == pytest.approx(expected[theirs], rel=1e-4)
    model.zero_grad()
    out.loss.backward()
    norms = gradient_norms(model)
    assert norms.keys() == case["grad_norm"].keys()
    # Gradients that are 0 but for rounding (an attention's key bias) have no relative error.
    tiny = 1e-7 * max(case["grad_norm"].values())
    assert norms == pytest.approx(case["grad_norm"], rel=1e-3, abs=tiny)
    model.zero_grad()


def gradient_norms(model: Self1EForSegmentation) -> dict[str, float]:
    """By layout (c) name; q, k and v of the ViT together, as their fused tensor."""
    renamings = [x.reverse_transform() for x in reversed(published_names()) if isinstance(x, WeightRenaming)]
    squares: dict[str, float] = {}
    for name, parameter in model.named_parameters():
        fused = re.sub(r"(?<=vision_tower)(.*)\.attention\.[qkv]_proj", r"\1.attn.qkv", name)
        name = apply_renamings(fused, renamings)
        squares[name] = squares.get(name, 0.0) + parameter.grad.double().square().sum().item()
    return {name: value**0.5 for name, value in squares.items()}


def test_eight_adamw_steps_agree():
    """The recipe of the record, at its top level; losses to 1e-3 relative."""
    run = RECORD["adamw_run"]
    _, _, batch = read(run["batch"])
    model = without_noise(fresh_model())
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
