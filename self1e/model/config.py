"""Configuration: InternVL's, plus the `[SEG]` id and the switches of the paper's ablations (one line each).

InternVL with a Qwen2 or Qwen3 LLM is the only backbone; CONTRIBUTING.md lists what another family would touch.
"""

import re
from pathlib import Path
from typing import cast

import torch
from huggingface_hub.dataclasses import strict
from huggingface_hub.errors import StrictDataclassError
from transformers import InternVLConfig, PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from self1e.model.switches import SWITCHES

# Precisions by the names that command lines use.
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# What the library raises over values of the wrong kind: lists for numbers, missing keys, nesting without end.
DAMAGE = (StrictDataclassError, LookupError, TypeError, AttributeError, RecursionError, ArithmeticError)
HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")


@strict
class Self1EConfig(InternVLConfig):
    r"""
    Args:
        seg_token_id (`int`, *optional*): id of `[SEG]`; None in a base model that never learned to segment.
        mask_features (`str`): `baseline`, `replication`, `rfr` (refilled with the LLM's residual) or `rfa`
            (amplified as well: the full method); see `self1e.model.head`.
        replication (`str`): `tile`, `window` or `interpolate`; see `self1e.model.grids`.
        attention_pathway (`str`): `causal`, `image` or `image+seg`; see `self1e.model.attention`.
        auxiliary_loss (`bool`): train the LLM's own image features with the mask losses too.
        auxiliary_projection (`bool`): the auxiliary image side passes `f_out` (`rfa` only).
        rope_precision (`str`): `fp32`, or `bf16`: the rotary frequencies are rounded as the published engine did.
        ce_loss_weight, bce_loss_weight, dice_loss_weight (`float`): weights of the loss's terms.
        drop_path_rate (`float`): stochastic depth of the ViT, rising linearly from 0 over its layers, training only.
    """

    model_type = "self1e"

    seg_token_id: int | None = None
    mask_features: str = SWITCHES["mask_features"].default
    replication: str = SWITCHES["replication"].default
    attention_pathway: str = SWITCHES["attention_pathway"].default
    auxiliary_loss: bool = SWITCHES["auxiliary_loss"].default
    auxiliary_projection: bool = SWITCHES["auxiliary_projection"].default
    rope_precision: str = SWITCHES["rope_precision"].default
    ce_loss_weight: float | int = SWITCHES["ce_loss_weight"].default
    bce_loss_weight: float | int = SWITCHES["bce_loss_weight"].default
    dice_loss_weight: float | int = SWITCHES["dice_loss_weight"].default
    drop_path_rate: float | int = 0.0
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        self.check_switches()

    def check_switches(self):
        """Raise ValueError for a switch outside its values."""
        for name, switch in SWITCHES.items():
            if switch.choices is not None and getattr(self, name) not in switch.choices:
                raise ValueError(f"{name}={getattr(self, name)!r} is unknown; one of {', '.join(switch.choices)}")
        if self.auxiliary_projection and not (self.auxiliary_loss and self.mask_features == "rfa"):
            raise ValueError("auxiliary_projection needs auxiliary_loss and mask_features='rfa': it reuses f_out")

    @property
    def ratio(self) -> int:
        """r: patches per side that one image token stands for."""
        return round(1 / self.downsample_ratio)

    @property
    def llm(self) -> PreTrainedConfig:
        """The LLM's configuration, which the library's annotation calls optional."""
        return cast(PreTrainedConfig, self.text_config)

    @property
    def vit(self) -> PreTrainedConfig:
        """The ViT's configuration."""
        return cast(PreTrainedConfig, self.vision_config)

    @property
    def tile_size(self) -> int:
        """Pixels per side of a tile."""
        return self.vit.image_size[0]

    @property
    def tile_side(self) -> int:
        """L: image tokens per tile side."""
        return self.tile_size // self.vit.patch_size[0] // self.ratio

    @property
    def tile_tokens(self) -> int:
        """L * L: image tokens per tile."""
        return self.tile_side**2

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, **kwargs):
        """As the library's; a `config.json` with values of the wrong kind is a ValueError that names it."""
        try:
            return super().from_pretrained(pretrained_model_name_or_path, **kwargs)
        except (*DAMAGE, ValueError) as error:
            if isinstance(error, ValueError) and str(pretrained_model_name_or_path) in str(error):
                raise
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            raise ValueError(f"{pretrained_model_name_or_path}: config.json is damaged ({reason})") from error

    @classmethod
    def get_config_dict(cls, pretrained_model_name_or_path, **kwargs):
        """Read the configuration of any of the four checkpoint layouts (see `self1e.model.weights`).

        Raises FileNotFoundError where there is none, ValueError for a broken one or another architecture.
        """
        source = pretrained_model_name_or_path
        check_source(source, kwargs.get("subfolder"))
        try:
            values, kwargs = super().get_config_dict(source, **kwargs)
        except OSError as error:
            reason = str(error).splitlines()[0]
            if Path(source).is_dir():
                raise ValueError(f"{source}: {reason}") from error
            raise FileNotFoundError(f"there is no folder {source}, and the hub did not serve it: {reason}") from error
        return native_config(_without_requests(values, source), source), kwargs


def check_source(source: str | Path, subfolder: str | None = None) -> None:
    """Raise FileNotFoundError for a path without a checkpoint, before anything asks the hub for it."""
    folder = Path(source, subfolder or "")
    advice = "--version and --model_weights take a checkpoint folder or a hub id such as OpenGVLab/InternVL3-2B"
    if Path(source).is_dir():
        if not (folder / "config.json").is_file():
            raise FileNotFoundError(f"{folder} holds no config.json; {advice}")
    elif not HUB_ID.fullmatch(str(source)) or Path(source).parent.is_dir():
        what = f"{source} is a file" if Path(source).is_file() else f"there is no folder {source}"
        raise FileNotFoundError(f"{what}; {advice}")


# What a `config.json` may ask of the library besides values of the model: to run code beside it or on the hub, such as
# attention kernels, or to read other weights. Loading says itself what it wants.
REQUESTS = frozenset(
    "auto_map attn_implementation _attn_implementation _attn_implementation_internal experts_implementation "
    "_experts_implementation _experts_implementation_internal use_kernels kernel_config transformers_weights".split()
)


def _without_requests(values: dict, source: str) -> dict:
    """A configuration and those within it without `REQUESTS`. Raises ValueError for quantised weights."""
    if values.get("quantization_config"):
        raise ValueError(f"{source}: config.json speaks of quantised weights; expected a checkpoint in full precision")
    return {
        name: _without_requests(value, source) if name.endswith("_config") and isinstance(value, dict) else value
        for name, value in values.items()
        if name not in REQUESTS
    }


# Original InternVL vision keys -> transformers' names.
SAME_KEYS = (
    "hidden_size num_hidden_layers num_attention_heads intermediate_size hidden_act attention_dropout "
    "initializer_range norm_type layer_norm_eps image_size patch_size num_channels"
).split()
VISION_KEYS = dict(zip(SAME_KEYS, SAME_KEYS)) | {
    "qkv_bias": "attention_bias", "qk_normalization": "use_qk_norm", "dropout": "hidden_dropout_prob"
}  # fmt: skip


def native_config(values: dict, source: str) -> dict:
    """Translate a `config.json` of any layout to `Self1EConfig`'s keys; ValueError for another."""
    kind = values.get("model_type")
    if kind in ("internvl", "self1e"):
        text = values.get("text_config") or {}
        tied = text.get("tie_word_embeddings", values.get("tie_word_embeddings", False))
        return {**values, "model_type": "self1e", "tie_word_embeddings": tied}
    if kind != "internvl_chat":
        raise ValueError(
            f"{source}: config.json says model_type={kind!r}; expected an InternVL3 checkpoint: internvl_chat "
            "(original), internvl (-hf) or self1e"
        )
    text, vision = values["llm_config"], values["vision_config"]
    if text.get("model_type") not in ("qwen2", "qwen3"):
        raise ValueError(f"{source}: llm_config is {text.get('model_type')!r}; expected a qwen2 or qwen3 LLM")
    if values.get("select_layer", -1) != -1:
        raise ValueError(f"{source}: select_layer={values['select_layer']}; only the ViT's last (-1) is supported")
    known = CONFIG_MAPPING[text["model_type"]]().to_dict().keys() | {"rope_theta", "rope_scaling"}
    return {
        "model_type": "self1e",
        "text_config": {key: value for key, value in text.items() if key in known and key != "dtype"},
        "vision_config": {new: vision[old] for old, new in VISION_KEYS.items() if old in vision}
        | {"model_type": "internvl_vision", "image_size": values.get("force_image_size") or vision["image_size"]},
        "downsample_ratio": values.get("downsample_ratio", 0.5),
        "drop_path_rate": vision.get("drop_path_rate", 0.0),
        "tie_word_embeddings": text.get("tie_word_embeddings", False),
        "dtype": values.get("torch_dtype") or values.get("dtype"),
    }


def original_config(config: Self1EConfig) -> dict:
    """The `config.json` of layout `published` for a `Self1EConfig`: the inverse of `native_config`."""
    vision = config.vit.to_dict()
    vision |= {"image_size": vision["image_size"][0], "patch_size": vision["patch_size"][0]}
    text = config.llm.to_dict()
    rope = text.pop("rope_parameters", None) or {}
    text["rope_theta"] = rope.pop("rope_theta", None)
    text["rope_scaling"] = rope if rope.get("rope_type", "default") != "default" else None
    return {
        "model_type": "internvl_chat",
        "architectures": ["InternVL3SELF1E"],
        "llm_config": text,
        "vision_config": {old: vision[new] for old, new in VISION_KEYS.items()}
        | {"model_type": "intern_vit_6b", "drop_path_rate": config.drop_path_rate},
        "force_image_size": config.tile_size,
        "downsample_ratio": config.downsample_ratio,
        "select_layer": -1,
        "template": "internvl2_5",
        "ps_version": "v2",
        "dynamic_image_size": True,
        "use_thumbnail": True,
        "torch_dtype": str(config.dtype).removeprefix("torch."),
    }
