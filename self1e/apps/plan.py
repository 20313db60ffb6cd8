"""What a training run will take of each GPU and how long it will last; see scripts/plan.py.

The model is built on the `meta` device, with shapes and without values, and trains one micro-batch there: its
parameters, FLOPs and live tensors are those of a real step. What DeepSpeed keeps beside them follows from its
configuration.
"""

from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from self1e.apps.measuring import Peak
from self1e.model.batch import IGNORE_INDEX, pack
from self1e.model.config import DTYPES, SWITCHES, Self1EConfig
from self1e.model.modeling import Self1EForSegmentation
from self1e.model.processor import HIGH_RES_TILES
from self1e.training.adapters import adapt_as_asked, train_added_tokens
from self1e.training.train import check_length

# Published sizes: LLM (width, layers, heads, key/value heads, MLP width) over InternViT-300M.
SIZES = {"1B": (896, 24, 14, 2, 4864), "2B": (1536, 28, 12, 2, 8960), "8B": (3584, 28, 28, 4, 18944)}
VOCABULARY, IMAGE_TOKEN = 151674, 151667  # of the InternVL3 releases
FP32 = 4  # bytes
BUCKET = 500_000_000  # elements, DeepSpeed's `reduce_bucket_size`; ZeRO-2 has two because of `overlap_comm`
GATHERED = 1_000_000_000  # its `stage3_max_live_parameters`
PHOTO = (480, 640)  # pixels of a mask, as most photos of COCO
FURTHER = 4  # times `--batch_size`: the second batch through which the line of activations goes


@dataclass(frozen=True)
class Fixed:
    """Bytes that are there whatever the batch: on each GPU, and `host`, of CPU memory per GPU."""

    parameters: float
    gradients: float
    optimizer: float
    buffers: float
    host: float = 0

    @property
    def gpu(self) -> float:
        return self.parameters + self.gradients + self.optimizer + self.buffers


def fixed_memory(parameters: int, trained: int, *, width: int, gpus: int, stage: int, offload: bool) -> Fixed:
    """What DeepSpeed keeps for `parameters` weights of `width` bytes each, of which `trained` train.

    stage: 2 splits sums of gradients, master weights and AdamW's moments (fp32) over the GPUs; 3 the weights, too, and
        gathers those in use. offload: what is split goes to CPU memory.
    """
    weights = parameters * width / (gpus if stage == 3 else 1)
    gradients, optimizer = trained * FP32 / gpus, trained * 3 * FP32 / gpus
    buffers = width * (BUCKET + min(parameters, GATHERED) if stage == 3 else 2 * BUCKET)
    if not offload:
        return Fixed(weights, gradients, optimizer, buffers)
    if stage == 3:
        return Fixed(0, 0, 0, buffers, host=weights + gradients + optimizer)
    return Fixed(weights, 0, 0, buffers, host=gradients + optimizer)


def configuration(args: Namespace) -> Self1EConfig:
    """The configuration of `--version`, a checkpoint or a key of `SIZES`, with the switches of the flags."""
    if args.version in SIZES:
        width, layers, heads, kv_heads, mlp = SIZES[args.version]
        llm = {"model_type": "qwen2", "hidden_size": width, "num_hidden_layers": layers, "intermediate_size": mlp}
        llm |= {"num_attention_heads": heads, "num_key_value_heads": kv_heads, "vocab_size": VOCABULARY}
        vit = {"model_type": "internvl_vision", "hidden_size": 1024, "num_hidden_layers": 24, "image_size": 448}
        vit |= {"num_attention_heads": 16, "intermediate_size": 4096, "patch_size": 14, "attention_bias": True}
        config = Self1EConfig(text_config=llm, vision_config=vit, drop_path_rate=0.1, image_token_id=IMAGE_TOKEN)
    else:
        config = Self1EConfig.from_pretrained(args.version)
    if config.seg_token_id is None:  # a base, to which [SEG] and [SEGT] will be added
        config.seg_token_id = config.llm.vocab_size
        config.llm.vocab_size += 2
    for name in SWITCHES:
        if getattr(args, name) is not None:
            setattr(config, name, getattr(args, name))
    config.check_switches()
    return config


def build(args: Namespace) -> Self1EForSegmentation:
    """The model as the flags of training adapt it, on the `meta` device, in the precision of DeepSpeed's weights."""
    config = configuration(args)
    check_length(args, config.tile_tokens)
    with torch.device("meta"):
        model = Self1EForSegmentation(config)
        adapt_as_asked(args, model)
        if args.trainable_embeddings == "new":
            assert config.seg_token_id is not None
            train_added_tokens(model, config.seg_token_id)
    model.set_attn_implementation(args.attn_implementation)
    model.to(dtype=DTYPES[args.precision])  # type: ignore[call-arg]  # transformers annotates `self` of `to`
    if args.gradient_checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    return model.train()


def make_batch(args: Namespace, config: Self1EConfig, photos: int, device: str) -> dict[str, Any]:
    """A full micro-batch: `--num_classes_per_sample` rows of `--model_max_length` tokens per photo, a mask per row."""
    tiles = HIGH_RES_TILES if args.high_res else 1
    rows, image = photos * args.num_classes_per_sample, tiles * config.tile_tokens
    ids = torch.zeros(rows, args.model_max_length, dtype=torch.long)
    ids[:, 1 : 1 + image] = config.image_token_id
    assert config.seg_token_id is not None
    ids[:, -2] = config.seg_token_id
    labels = ids.clone()
    labels[:, : max(1 + image, ids.shape[1] - args.answer_tokens)] = IGNORE_INDEX
    grids = [(2, 2) if args.high_res else (1, 1)] * photos
    row_image = [row // args.num_classes_per_sample for row in range(rows)]
    packed = pack(
        ids,
        labels=labels,
        grids=grids,
        row_image=row_image,
        tile_tokens=config.tile_tokens,
        image_token_id=config.image_token_id,
        seg_token_id=config.seg_token_id,
    )
    return {
        "input_ids": ids.to(device),
        "labels": labels.to(device),
        "pixel_values": torch.zeros(photos * tiles, 3, config.tile_size, config.tile_size, device=device),
        "tile_grids": torch.tensor(grids),
        "row_image": torch.tensor(row_image),
        "mask_targets": [torch.zeros(1, *PHOTO, dtype=torch.uint8, device=device) for _ in row_image],
        "packed": packed,
    }


def fused_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """SDPA by the kernel of a GPU, which keeps no scores; on `meta`, torch itself would choose the one that does."""
    if enable_gqa:
        key, value = (x.repeat_interleave(query.shape[1] // key.shape[1], 1) for x in (key, value))
    if attn_mask is not None:
        attn_mask = attn_mask.to(query.dtype).expand(*query.shape[:-1], key.shape[-2])
    kernel = torch.ops.aten._scaled_dot_product_efficient_attention
    return kernel(query, key, value, attn_mask, True, dropout_p, is_causal, scale=scale)[0]


@contextmanager
def without_gradients(model: Self1EForSegmentation) -> Iterator[None]:
    """Each gradient goes as soon as it is there: DeepSpeed adds it to its sums, which `Fixed` counts."""
    trained = [x for x in model.parameters() if x.requires_grad]
    hooks = [x.register_post_accumulate_grad_hook(lambda x: setattr(x, "grad", None)) for x in trained]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def step(args: Namespace, model: Self1EForSegmentation, photos: int) -> None:
    """Forward and backward pass over a full micro-batch, on `meta`."""
    with without_gradients(model), patch.object(F, "scaled_dot_product_attention", fused_attention):
        model(**make_batch(args, model.config, photos, "meta")).loss.backward()


def count_activations(args: Namespace, model: Self1EForSegmentation, photos: int) -> int:
    """Peak bytes of the tensors of a micro-batch: the batch, activations, and gradients on their way to the sums."""
    with Peak([*model.parameters(), *model.buffers()]) as peak:
        step(args, model, photos)
    return peak.most


def count_flops(args: Namespace, model: Self1EForSegmentation, photos: int) -> int:
    """FLOPs of a micro-batch, with what gradient checkpointing computes twice."""
    with FlopCounterMode(display=False) as counter:
        step(args, model, photos)
    return counter.get_total_flops()


def make_plan(args: Namespace) -> dict[str, Any]:
    """Every figure, bytes and seconds; `args` are the flags of training and of scripts/plan.py."""
    model = build(args)
    parameters = sum(x.numel() for x in model.parameters())
    trained = sum(x.numel() for x in model.parameters() if x.requires_grad)
    # Photos or rows are the first axis of every activation, so the bytes of batches of any size lie on a line. Only
    # where a gradient on its way weighs more than the photos, at the smallest sizes, they lie above it.
    few, many = args.batch_size, args.batch_size * FURTHER
    activations, further = (count_activations(args, model, photos) for photos in (few, many))
    per_photo = (further - activations) / (many - few)
    flops = count_flops(args, model, few)
    usable = args.gpu_memory * 1e9 * (1 - args.headroom)
    cases = []
    for stage in (2, 3):
        for offload in (False, True):
            width = DTYPES[args.precision].itemsize
            fixed = fixed_memory(parameters, trained, width=width, gpus=args.gpus, stage=stage, offload=offload)
            total = fixed.gpu + activations
            largest = max(0, int(few + (usable - total) // per_photo))
            cases.append({"stage": stage, "offload": offload, **vars(fixed), "total": total, "largest": largest})
    steps = -(-args.samples // (args.batch_size * args.grad_accumulation_steps * args.gpus))
    seconds = flops * args.grad_accumulation_steps / (args.gpu_tflops * 1e12 * args.utilisation)
    return {
        "version": args.version,
        "parameters": parameters,
        "trained": trained,
        "activations": activations,
        "activations_per_further_photo": per_photo,
        "flops_per_micro_batch": flops,
        "steps_per_epoch": steps,
        "seconds_per_step": seconds,
        "days_per_epoch": steps * seconds / 86400,
        "cases": cases,
    }
