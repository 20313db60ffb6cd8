"""A tiny InternVL3: random weights and a small tokenizer of its own, in the layout of the original checkpoints.

The command is in `apps.make`.
"""

from pathlib import Path
from typing import Any

import torch
from torch import nn

from self1e.files import write_json
from self1e.model.config import Self1EConfig, original_config
from self1e.model.modeling import Self1EForSegmentation
from self1e.model.weights import published_names
from self1e.synthetic.tiny_tokenizer import make_tokenizer

ENDS_OF_BRANCHES = ("projection_layer", "fc2", "o_proj", "down_proj")
STD = {"embed_tokens": 1.0, "lm_head": 0.02, "cls_token": 0.02}


@torch.no_grad()
def initialise(model: Self1EForSegmentation, seed: int) -> None:
    """Initialise to learn from scratch in minutes, not like the real pre-training.

    Linear layers are normal with variance 1/fan_in, those that end a residual branch divided by sqrt(2 * layers);
    vision positions are fixed 2-D sines; the exceptions are in `STD`. Norms, biases and layer scales stay.
    """
    generator = torch.Generator().manual_seed(seed)
    vision: Any = model.config.vision_config
    text: Any = model.config.text_config
    for name, weight in model.named_parameters():
        layer = name.removesuffix(".weight").split(".")[-1]
        if weight.ndim > 1:
            layers = (vision if "vision_tower" in name else text).num_hidden_layers
            std = STD.get(layer, weight[0].numel() ** -0.5)
            weight.normal_(std=std / (2 * layers) ** 0.5 if layer in ENDS_OF_BRANCHES else std, generator=generator)
    positions = model.model.vision_tower.embeddings.position_embeddings  # (1, 1 + S * S, Cv), first that of the CLS
    positions[0, 0] = 0
    positions[0, 1:] = sine_positions(vision.image_size[0] // vision.patch_size[0], vision.hidden_size)


def sine_positions(side: int, width: int) -> torch.Tensor:
    """Fixed 2-D position embedding (MAE, big_vision): (side * side, width), a quarter each sin/cos of y and x."""
    omega = 10_000 ** (-torch.arange(width // 4) / (width // 4))
    angle = torch.arange(side)[:, None] * omega
    wave = torch.cat([angle.sin(), angle.cos()], dim=1)
    y, x = wave[:, None].expand(side, side, -1), wave[None].expand(side, side, -1)
    return torch.cat([y, x], dim=-1).flatten(0, 1)


def make_tiny_internvl(
    path: str | Path,
    *,
    llm: str = "qwen2",
    image_size: int = 112,
    width: int = 96,
    layers: int = 4,
    heads: int = 4,
    vision_width: int = 96,
    vision_layers: int = 4,
    drop_path_rate: float = 0.0,
    vocab_size: int = 2048,
    tie_word_embeddings: bool = False,
    shards: int = 1,
    seed: int = 0,
) -> Path:
    """Write a checkpoint folder: config, bf16 weights and tokenizer; the same options write the same bytes.

    Args:
        llm: `qwen2`, or `qwen3` (q and k norms, no bias in q, k, v).
        image_size: pixels per side of a tile, a multiple of 28: patches have 14.
        width, layers: of the LLM, its MLP is 3 times as wide. vision_width, vision_layers: of the ViT, its 4 times.
        heads: of both; the LLM has half as many for keys and values.
        drop_path_rate: stochastic depth of the ViT's last layer.
        vocab_size: byte symbols and merges at most.
        tie_word_embeddings: no lm_head of its own, like Qwen2 0.5B.
        shards: weight files, about.
    """
    tokenizer = make_tokenizer(vocab_size)
    text = {
        "model_type": llm, "vocab_size": len(tokenizer), "hidden_size": width, "num_hidden_layers": layers,
        "num_attention_heads": heads, "num_key_value_heads": heads // 2, "head_dim": width // heads,
        "intermediate_size": 3 * width, "tie_word_embeddings": tie_word_embeddings, "rope_theta": 1e6,
        "rope_scaling": {"rope_type": "dynamic", "factor": 2.0},
    }  # fmt: skip
    vision = {
        "model_type": "internvl_vision", "image_size": [image_size] * 2, "patch_size": [14, 14],
        "hidden_size": vision_width, "num_hidden_layers": vision_layers, "num_attention_heads": heads,
        "intermediate_size": 4 * vision_width, "attention_bias": True, "layer_scale_init_value": 1.0,
    }  # fmt: skip
    config = Self1EConfig(
        text_config=text, vision_config=vision, drop_path_rate=drop_path_rate, tie_word_embeddings=tie_word_embeddings
    )
    model: Any = Self1EForSegmentation(config)
    model.segmentation_head = nn.Module()  # a base model has none
    initialise(model, seed)
    model.bfloat16()
    size = sum(weight.nbytes for weight in model.parameters())
    model._weight_conversions = published_names()
    model.save_pretrained(path, save_original_format=True, max_shard_size=-(-size // shards))
    tokenizer.save_pretrained(path)
    values = original_config(config) | {"architectures": ["InternVLChatModel"]}
    values["auto_map"] = {"AutoConfig": "configuration_internvl_chat.InternVLChatConfig"}
    del values["weights_id"]
    write_json(Path(path) / "config.json", values, indent=2)
    return Path(path)
