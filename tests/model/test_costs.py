"""What the model costs at the 2B's widths: FLOPs and the peak of live tensors, counted on meta tensors.

The limits are shares of what the published program was measured to need for the same work (4 ViT and 4 LLM layers,
float32, weights included): 7.9 GB to evaluate 7 sentences about a photo, 9.5 GB to train on 2 photos x 3 rows.
"""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

from self1e import Self1EConfig, Self1EForSegmentation
from self1e.apps.measuring import Peak
from self1e.model.batch import pack
from self1e.model.inference import masks_of
from self1e.training.adapters import adapt

TEXT = {
    "model_type": "qwen2", "hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 4,
    "num_attention_heads": 12, "num_key_value_heads": 2, "vocab_size": 151676, "tie_word_embeddings": False,
}  # fmt: skip
VISION = {
    "model_type": "internvl_vision", "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 4,
    "num_attention_heads": 16, "image_size": [448, 448], "patch_size": [14, 14], "attention_bias": True,
}  # fmt: skip
IMAGE, SEG, TILE_TOKENS, LENGTH = 151667, 151674, 256, 309
PUBLISHED_EVALUATION, PUBLISHED_TRAINING = 7.9e9, 9.5e9  # bytes


def flash(q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, **kwargs):
    """Attention that keeps no weights, as on CPU and GPU; meta tensors would go another way."""
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        attn_mask = torch.where(attn_mask, 0.0, float("-inf"))
    op = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    return op(q, k, v, dropout_p, is_causal, attn_mask=attn_mask, scale=scale)[0]


@pytest.fixture
def model() -> Self1EForSegmentation:
    config = Self1EConfig(text_config=TEXT, vision_config=VISION, seg_token_id=SEG, image_token_id=IMAGE)
    config._attn_implementation = "sdpa"
    with torch.device("meta"):
        return Self1EForSegmentation(config)


def batch(photos: int, rows: int, *, training: bool) -> dict:
    """Rows of 309 tokens, four of them supervised: in training all on the device, in evaluation the photos alone."""
    ids = torch.full((photos * rows, LENGTH), 100)
    ids[:, 20 : 20 + TILE_TOKENS], ids[:, -3] = IMAGE, SEG
    row_image = torch.arange(photos).repeat_interleave(rows)
    found = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "row_image": row_image}
    found |= {"pixel_values": torch.empty(photos, 3, 448, 448), "tile_grids": torch.ones(photos, 2, dtype=torch.long)}
    if training:
        labels = torch.full_like(ids, -100)
        labels[:, -5:-1] = ids[:, -5:-1]
        packed = pack(
            ids, None, labels, grids=[(1, 1)] * photos, row_image=row_image.tolist(),
            tile_tokens=TILE_TOKENS, image_token_id=IMAGE, seg_token_id=SEG,
        )  # fmt: skip
        masks = [torch.ones(1, 480, 640, dtype=torch.uint8, device="meta")] * len(ids)
        found |= {"labels": labels, "packed": packed, "mask_targets": masks}
        found = {name: x if isinstance(x, list) else x.to("meta") for name, x in found.items()}
    return found


def cost(work: Callable[[], object], model) -> tuple[float, float]:
    """FLOPs, and bytes of all tensors that are alive together; counted one after the other, for hooks keep tensors."""
    with FlopCounterMode(display=False) as counter:
        work()
    model.zero_grad()
    with pytest.MonkeyPatch.context() as patch, Peak(model.parameters()) as memory:
        patch.setattr(functional, "scaled_dot_product_attention", flash)
        work()
    weights = sum(x.nbytes for x in model.parameters())
    return counter.get_total_flops(), weights + memory.most


def test_training(model):
    model.train()
    inputs = batch(2, 3, training=True)
    flops, memory = cost(lambda: model(**inputs).loss.backward(), model)
    print(f"training: {flops / 1e12:.3f} TFLOP, {memory / 1e9:.3f} GB, {memory / PUBLISHED_TRAINING:.3f} of published")
    assert flops <= 4.1e12
    assert memory <= 0.65 * PUBLISHED_TRAINING


def test_training_by_the_recipe(model):
    """With adapters and gradient checkpointing, the states of layers never come on top of weights and gradients."""
    with torch.device("meta"):
        adapt(model, llm_lora=True, vision_lora=True, optimize_vision=True)
    model.train().activation_checkpointing_enable()
    inputs = batch(2, 3, training=True)
    flops, memory = cost(lambda: model(**inputs).loss.backward(), model)
    least = sum(x.nbytes * (1 + x.requires_grad) for x in model.parameters())
    print(f"by the recipe: {flops / 1e12:.3f} TFLOP, {memory / 1e9:.3f} GB, weights and gradients {least / 1e9:.3f}")
    assert memory <= 1.02 * least


@torch.no_grad()
def test_evaluation(model):
    found = {}
    for rows in (7, 30):
        inputs = batch(1, rows, training=False)

        work = partial(masks_of, model.eval(), inputs, [(480, 640)])
        flops, memory = found[rows] = cost(work, model)
        share = memory / PUBLISHED_EVALUATION
        print(f"{rows} sentences: {flops / 1e12:.3f} TFLOP, {memory / 1e9:.3f} GB, {share:.3f} of published")
    assert found[7][0] <= 1.18e12
    assert found[7][1] <= 0.50 * PUBLISHED_EVALUATION
    assert found[30][1] <= 1.1 * found[7][1]
