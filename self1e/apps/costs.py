"""What the model costs at full depth: floating-point operations and memory, counted on tensors without values.

The model is built on the `meta` device and trains or evaluates there, with the shapes of a real step; only attention
is taken to be a GPU's kernel, which keeps no scores. `scripts/benchmark.py --meta` prints what it says of all sizes.
"""

import weakref
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from self1e.model import inference
from self1e.model.batch import IGNORE_INDEX
from self1e.model.config import Self1EConfig
from self1e.model.modeling import Self1EForSegmentation, selective_checkpointing_kwargs
from self1e.training.adapters import adapt

# LLM of the published sizes (width, layers, heads, key/value heads, MLP width) over InternViT-300M.
SIZES = {"1B": (896, 24, 14, 2, 4864), "2B": (1536, 28, 12, 2, 8960), "8B": (3584, 28, 28, 4, 18944)}
IMAGE_TOKEN, SEG_TOKEN, VOCABULARY = 151667, 151674, 151676
TEXT_TOKENS, ANSWER_TOKENS = 53, 5  # of a conversation: those besides its image, and of them the supervised ones
PHOTO = (480, 640)  # pixels of a mask, as most of COCO
CHECKPOINTING: dict[str, dict[str, Any]] = {
    "none": {},
    "selective": selective_checkpointing_kwargs(),
    "full": {"use_reentrant": False},
}


class Cost(NamedTuple):
    flops: int  # of all passes, recomputation included
    weights: int  # bytes
    activations: int  # peak bytes of all tensors but the weights and their gradients


class Memory(TorchDispatchMode):
    """Counts the bytes of the tensors that are in memory together, those of `known` left out, and their `peak`."""

    def __init__(self, known: Iterable[Tensor]):
        super().__init__()
        self.now = self.peak = 0
        self.alive = {x.untyped_storage()._cdata for x in known}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, Tensor) and (storage := x.untyped_storage())._cdata not in self.alive:
                self.count(storage._cdata, storage.nbytes())
                weakref.finalize(storage, self.count, storage._cdata, -storage.nbytes())
        return out

    def count(self, key: int, size: int) -> None:
        self.alive ^= {key}
        self.now += size
        self.peak = max(self.peak, self.now)


def configuration(size: str) -> Self1EConfig:
    """The full method at a published size, a key of `SIZES`."""
    width, layers, heads, kv_heads, mlp = SIZES[size]
    llm = {"model_type": "qwen2", "hidden_size": width, "num_hidden_layers": layers, "intermediate_size": mlp}
    llm |= {"num_attention_heads": heads, "num_key_value_heads": kv_heads, "vocab_size": VOCABULARY}
    vit = {"model_type": "internvl_vision", "hidden_size": 1024, "num_hidden_layers": 24, "image_size": [448, 448]}
    vit |= {"num_attention_heads": 16, "intermediate_size": 4096, "patch_size": [14, 14], "attention_bias": True}
    ids: dict[str, Any] = {"image_token_id": IMAGE_TOKEN, "seg_token_id": SEG_TOKEN}
    return Self1EConfig(text_config=llm, vision_config=vit, drop_path_rate=0.1, **ids)


def build(size: str, *, images: int, each: int, tiles: int, training: bool) -> tuple[Any, dict[str, Tensor]]:
    """The full method in bfloat16 without values, and a batch of `images * each` conversations with one `[SEG]`.

    training: with adapters on both towers by the recipe, head and embeddings train whole.
    """
    config = configuration(size)
    with torch.device("meta"):
        model: Any = Self1EForSegmentation._from_config(config, attn_implementation="sdpa")
        if training:
            adapt(model, use_llm_lora=True, use_vision_lora=True, optimize_vision=True)
    ids = torch.full((images * each, tiles * config.tile_tokens + TEXT_TOKENS), 100)
    ids[:, 1 : 1 + tiles * config.tile_tokens], ids[:, -3] = IMAGE_TOKEN, SEG_TOKEN
    return model.to(torch.bfloat16).train(training), {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": torch.empty(images * tiles, 3, config.tile_size, config.tile_size, device="meta"),
        "tile_grids": torch.tensor([(1, tiles)] * images),
        "row_image": torch.arange(images).repeat_interleave(each),
    }


def training_cost(
    size: str, checkpointing: str = "none", *, images: int = 5, conversations: int = 3, tiles: int = 1
) -> Cost:
    """Forward and backward pass of a micro-batch by the recipe.

    checkpointing: a key of `CHECKPOINTING`. conversations: about each image.
    """
    model, batch = build(size, images=images, each=conversations, tiles=tiles, training=True)
    if kwargs := CHECKPOINTING[checkpointing]:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=kwargs)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(lambda x: setattr(x, "grad", None))
    labels = batch["input_ids"].clone()
    labels[:, :-ANSWER_TOKENS] = IGNORE_INDEX
    targets = [torch.empty(1, *PHOTO, dtype=torch.uint8, device="meta") for _ in labels]
    return count(model, lambda: model(**batch, labels=labels, mask_targets=targets).loss.backward())


def evaluation_cost(size: str, *, sentences: int = 7, tiles: int = 1) -> Cost:
    """The masks of sentences about one image."""
    model, batch = build(size, images=1, each=sentences, tiles=tiles, training=False)
    with patch.object(inference, "check_finite"):  # there are no values
        return count(model, lambda: inference.masks_of(model, batch, [PHOTO]))


def count(model: Self1EForSegmentation, work: Callable[[], object]) -> Cost:
    """Count twice: the counter of operations keeps tensors that are computed again."""
    weights = [*model.parameters(), *model.buffers()]
    with patch.object(F, "scaled_dot_product_attention", fused_attention):
        with FlopCounterMode(display=False) as operations:
            work()
        with Memory(weights) as memory:
            work()
    return Cost(operations.get_total_flops(), sum(x.nbytes for x in weights), memory.peak)


def fused_attention(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
    """Attention by the kernel of a GPU, which keeps no scores; on `meta`, torch itself would choose one that does."""
    if enable_gqa:
        key, value = (x.repeat_interleave(query.shape[1] // key.shape[1], 1) for x in (key, value))
    if attn_mask is not None:
        attn_mask = attn_mask.to(query.dtype).expand(*query.shape[:-1], key.shape[-2])
    kernel = torch.ops.aten._scaled_dot_product_efficient_attention
    return kernel(query, key, value, attn_mask, True, dropout_p, is_causal, scale=scale)[0]
