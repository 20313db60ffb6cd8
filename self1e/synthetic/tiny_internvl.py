"""A tiny InternVL3: random weights and a small tokenizer of its own, in the layout of the real checkpoints.

The command is in `apps.make`.
"""

from pathlib import Path

import torch
from huggingface_hub import save_torch_state_dict

from self1e.files import write_json
from self1e.model.processor import MEAN, STD
from self1e.synthetic.tiny_tokenizer import save_tokenizer


def random_weights(config: dict, seed: int) -> dict[str, torch.Tensor]:
    """All tensors of layout `internvl`, float32, under the names of the original checkpoints.

    Initialised to learn from scratch in minutes, not like the real pre-training: linear layers are normal with
    variance 1/fan_in, those that end a residual branch divided by sqrt(2 * layers); vision positions are fixed 2-D
    sines; layer scales are `initializer_factor`; text embeddings have unit variance; `lm_head` N(0, 0.02).
    """
    generator = torch.Generator().manual_seed(seed)
    weights = {}

    def normal(name: str, *shape: int, std: float) -> None:
        weights[name] = torch.randn(shape, generator=generator) * std

    def linear(name: str, n_in: int, n_out: int, *, bias: bool = True, gain: float = 1.0) -> None:
        normal(f"{name}.weight", n_out, n_in, std=gain * n_in**-0.5)
        if bias:
            weights[f"{name}.bias"] = torch.zeros(n_out)

    def layer_norm(name: str, n: int) -> None:
        weights[f"{name}.weight"], weights[f"{name}.bias"] = torch.ones(n), torch.zeros(n)

    vit, llm = config["vision_config"], config["llm_config"]
    c, patch, side = vit["hidden_size"], vit["patch_size"], vit["image_size"] // vit["patch_size"]
    gain = (2 * vit["num_hidden_layers"]) ** -0.5
    embeddings = "vision_model.embeddings"
    normal(f"{embeddings}.class_embedding", 1, 1, c, std=0.02)
    normal(f"{embeddings}.patch_embedding.weight", c, 3, patch, patch, std=(3 * patch**2) ** -0.5)
    weights[f"{embeddings}.patch_embedding.bias"] = torch.zeros(c)
    weights[f"{embeddings}.position_embedding"] = torch.cat([torch.zeros(1, 1, c), sine_positions(side, c)], dim=1)
    for i in range(vit["num_hidden_layers"]):
        layer = f"vision_model.encoder.layers.{i}"
        layer_norm(f"{layer}.norm1", c)
        layer_norm(f"{layer}.norm2", c)
        linear(f"{layer}.attn.qkv", c, 3 * c)
        linear(f"{layer}.attn.proj", c, c, gain=gain)
        linear(f"{layer}.mlp.fc1", c, vit["intermediate_size"])
        linear(f"{layer}.mlp.fc2", vit["intermediate_size"], c, gain=gain)
        weights[f"{layer}.ls1"] = torch.full((c,), vit["initializer_factor"])
        weights[f"{layer}.ls2"] = torch.full((c,), vit["initializer_factor"])

    width = llm["hidden_size"]
    n_in = c * round(1 / config["downsample_ratio"]) ** 2
    layer_norm("mlp1.0", n_in)
    linear("mlp1.1", n_in, width)
    linear("mlp1.3", width, width)

    gain = (2 * llm["num_hidden_layers"]) ** -0.5
    head, qwen2 = llm["head_dim"], llm["model_type"] == "qwen2"
    n_q, n_kv = llm["num_attention_heads"] * head, llm["num_key_value_heads"] * head
    normal("language_model.model.embed_tokens.weight", llm["vocab_size"], width, std=1.0)
    for i in range(llm["num_hidden_layers"]):
        layer = f"language_model.model.layers.{i}"
        weights[f"{layer}.input_layernorm.weight"] = torch.ones(width)
        weights[f"{layer}.post_attention_layernorm.weight"] = torch.ones(width)
        linear(f"{layer}.self_attn.q_proj", width, n_q, bias=qwen2)
        linear(f"{layer}.self_attn.k_proj", width, n_kv, bias=qwen2)
        linear(f"{layer}.self_attn.v_proj", width, n_kv, bias=qwen2)
        linear(f"{layer}.self_attn.o_proj", n_q, width, bias=False, gain=gain)
        if not qwen2:
            weights[f"{layer}.self_attn.q_norm.weight"] = torch.ones(head)
            weights[f"{layer}.self_attn.k_norm.weight"] = torch.ones(head)
        linear(f"{layer}.mlp.gate_proj", width, llm["intermediate_size"], bias=False)
        linear(f"{layer}.mlp.up_proj", width, llm["intermediate_size"], bias=False)
        linear(f"{layer}.mlp.down_proj", llm["intermediate_size"], width, bias=False, gain=gain)
    weights["language_model.model.norm.weight"] = torch.ones(width)
    if not llm["tie_word_embeddings"]:
        normal("language_model.lm_head.weight", llm["vocab_size"], width, std=0.02)
    return weights


def sine_positions(side: int, width: int) -> torch.Tensor:
    """Fixed 2-D position embedding (MAE, big_vision): (1, side * side, width), a quarter each sin/cos of y and x."""
    omega = 10_000 ** (-torch.arange(width // 4) / (width // 4))
    angle = torch.arange(side)[:, None] * omega
    wave = torch.cat([angle.sin(), angle.cos()], dim=1)
    y, x = wave[:, None].expand(side, side, -1), wave[None].expand(side, side, -1)
    return torch.cat([y, x], dim=-1).reshape(1, side * side, width)


def internvl_config(options: dict, n_vocab: int, ids: dict[str, int]) -> dict:
    """config.json of layout `internvl`, with the keys of InternVL3's (InternVL3.5's for qwen3)."""
    llm = {
        "architectures": [{"qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}[options["llm"]]],
        "attention_dropout": 0.0, "bos_token_id": ids["<|endoftext|>"], "eos_token_id": ids["<|im_end|>"],
        "head_dim": options["width"] // options["heads"], "hidden_act": "silu", "hidden_size": options["width"],
        "initializer_range": 0.02, "intermediate_size": 3 * options["width"], "max_position_embeddings": 32768,
        "max_window_layers": 70, "model_type": options["llm"], "num_attention_heads": options["heads"],
        "num_hidden_layers": options["layers"], "num_key_value_heads": options["kv_heads"], "rms_norm_eps": 1e-6,
        "rope_scaling": {"factor": 2.0, "rope_type": "dynamic", "type": "dynamic"}, "rope_theta": 1e6,
        "sliding_window": None, "tie_word_embeddings": options["tie_word_embeddings"], "torch_dtype": "bfloat16",
        "use_cache": False, "use_sliding_window": False, "vocab_size": n_vocab,
    }  # fmt: skip
    if options["llm"] == "qwen3":
        llm["attention_bias"] = False
    vision = {
        "architectures": ["InternVisionModel"], "attention_dropout": 0.0, "drop_path_rate": options["drop_path_rate"],
        "dropout": 0.0, "hidden_act": "gelu", "hidden_size": options["vision_width"],
        "image_size": options["image_size"], "initializer_factor": options["layer_scale"], "initializer_range": 0.02,
        "intermediate_size": 4 * options["vision_width"], "layer_norm_eps": 1e-6, "model_type": "intern_vit_6b",
        "norm_type": "layer_norm", "num_attention_heads": options["vision_heads"], "num_channels": 3,
        "num_hidden_layers": options["vision_layers"], "patch_size": options["patch_size"], "qk_normalization": False,
        "qkv_bias": True, "torch_dtype": "bfloat16", "use_flash_attn": False,
    }  # fmt: skip
    return {
        "architectures": ["InternVLChatModel"],
        "auto_map": {"AutoConfig": "configuration_internvl_chat.InternVLChatConfig",
                     "AutoModel": "modeling_internvl_chat.InternVLChatModel"},
        "downsample_ratio": 0.5, "dynamic_image_size": True, "force_image_size": options["image_size"],
        "llm_config": llm, "max_dynamic_patch": 12, "min_dynamic_patch": 1, "model_type": "internvl_chat",
        "ps_version": "v2", "select_layer": -1, "template": "internvl2_5",
        "tie_word_embeddings": options["tie_word_embeddings"], "torch_dtype": "bfloat16",
        "use_backbone_lora": 0, "use_llm_lora": 0, "use_thumbnail": True, "vision_config": vision,
    }  # fmt: skip


def make_tiny_internvl(
    path: str | Path,
    *,
    llm: str = "qwen2",
    image_size: int = 112,
    patch_size: int = 14,
    width: int = 96,
    layers: int = 4,
    heads: int = 4,
    kv_heads: int = 2,
    vision_width: int = 96,
    vision_layers: int = 4,
    vision_heads: int = 4,
    layer_scale: float = 1.0,
    drop_path_rate: float = 0.0,
    vocab_size: int = 2048,
    tie_word_embeddings: bool = False,
    shards: int = 1,
    seed: int = 0,
) -> Path:
    """Write a checkpoint folder: config, bf16 weights, tokenizer and preprocessor files; same options, same bytes.

    Args:
        llm: `qwen2`, or `qwen3` (q and k norms, no bias in q, k, v).
        image_size, patch_size: pixels per side of a tile and of a patch, of which a tile holds an even number.
        width, layers, heads, kv_heads: the LLM; its MLP is 3 times as wide.
        vision_width, vision_layers, vision_heads: the ViT; its MLP is 4 times as wide.
        layer_scale: initial layer scale of the ViT's branches. drop_path_rate: stochastic depth of its last layer.
        vocab_size: byte symbols and merges at most.
        tie_word_embeddings: no lm_head of its own, like Qwen2 0.5B.
        shards: weight files, about.
    """
    options = dict(locals())
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    ids = save_tokenizer(folder, vocab_size)
    config = internvl_config(options, n_vocab=max(ids.values()) + 1, ids=ids)
    weights = {name: tensor.bfloat16() for name, tensor in random_weights(config, seed).items()}
    size = sum(tensor.nbytes for tensor in weights.values())
    save_torch_state_dict(weights, folder, max_shard_size=-(-size // shards))
    preprocessor = {
        "crop_size": image_size, "do_center_crop": True, "do_normalize": True, "do_resize": True,
        "feature_extractor_type": "CLIPFeatureExtractor", "image_mean": MEAN, "image_std": STD, "resample": 3,
        "size": image_size,
    }  # fmt: skip
    write_json(folder / "preprocessor_config.json", preprocessor, indent=2)
    write_json(folder / "generation_config.json", {"_from_model_config": True}, indent=2)
    write_json(folder / "config.json", config, indent=2)
    return folder
