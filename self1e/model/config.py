"""Configuration: InternVL's, plus the `[SEG]` id, the switches of the paper's ablations and the weights of the losses.

InternVL with a Qwen2 or Qwen3 LLM is the only backbone.
"""

import argparse
import re
from collections.abc import Collection
from dataclasses import field, fields
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi
from huggingface_hub.dataclasses import strict
from transformers import InternVLConfig, InternVLVisionConfig, PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from self1e.errors import UserError, check_known
from self1e.files import check_fetched, check_utf8
from self1e.model.attention import PATHWAYS
from self1e.model.grids import REPLICATIONS
from self1e.model.head import HEADS, AmplifiedHead


def switch(default: Any, help: str, choices: Collection[str] | None = None) -> Any:
    """A choice about the method, on or off without `choices`: a field, and what `add_argument` takes for its flag."""
    kind: dict[str, Any] = {"action": argparse.BooleanOptionalAction} if choices is None else {"choices": choices}
    kind["help"] = f"{help}; unset: the checkpoint's, or {default}"
    return field(default=default, metadata={"flag": kind})


# The total loss is the sum of these times the losses of `losses.py`.
LOSS_WEIGHTS = {"ce": 1.0, "mask_bce": 2.0, "mask_dice": 0.5}
# Flag -> loss: ce_loss_weight, bce_loss_weight, dice_loss_weight. They follow the checkpoint like the switches, and
# earlier checkpoints of our own have them as fields.
LOSS_FLAGS = {f"{name.removeprefix('mask_')}_loss_weight": name for name in LOSS_WEIGHTS}


@strict
class Self1EConfig(InternVLConfig):
    """Fields besides InternVL's. The switches are flags and keywords of `from_pretrained`, too, see `SWITCHES`."""

    model_type = "self1e"

    seg_token_id: int | None = None  # None in a base model that never learned to segment
    # A switch that nobody sets follows the checkpoint. The choices are the registries themselves.
    mask_features: str = switch("rfa", "features that the mask is read from", HEADS)
    replication: str = switch("tile", "how patch tokens are replicated for the mask's image side", REPLICATIONS)
    attention_pathway: str = switch("image+seg", "what image tokens see", PATHWAYS)
    auxiliary_loss: bool = switch(True, "train the LLM's own image features with the mask losses, too")
    auxiliary_projection: bool = switch(False, "send the auxiliary image side through f_out, too")
    rope_precision: str = switch("fp32", "rounding of rotary frequencies; published: bf16", ("fp32", "bf16"))
    loss_weights: dict[str, float | int] = field(default_factory=dict)  # those left out have their default
    drop_path_rate: float | int = 0.0  # stochastic depth of the ViT, rising linearly from 0 over its layers
    weights_id: str | None = None  # random, written with every save; tells the weights of two saves apart
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        self.loss_weights = LOSS_WEIGHTS | self.loss_weights
        self.check_switches()

    def check_switches(self):
        """Raise UserError for a switch outside its values."""
        for name, flag in SWITCHES.items():
            if "choices" in flag:
                check_known(name, [getattr(self, name)], flag["choices"])
        if self.auxiliary_projection:
            if not (self.auxiliary_loss and issubclass(HEADS[self.mask_features], AmplifiedHead)):
                raise UserError("auxiliary_projection needs auxiliary_loss and mask_features rfa: it uses f_out again")

    @property
    def ratio(self) -> int:  # r: patches per side that one image token stands for
        return round(1 / self.downsample_ratio)

    @property
    def tile_size(self) -> int:  # pixels per side of a tile
        return self.vision_config.image_size[0]

    @property
    def tile_side(self) -> int:  # L: image tokens per side of a tile
        return self.tile_size // self.vision_config.patch_size[0] // self.ratio

    @property
    def tile_tokens(self) -> int:
        return self.tile_side**2

    @classmethod
    def get_config_dict(cls, pretrained_model_name_or_path, **kwargs):
        """Read the configuration of any of the four checkpoint layouts (see `self1e.model.weights`).

        Raises UserError where there is none, and for another architecture.
        """
        source = str(pretrained_model_name_or_path)
        check_source(source, kwargs.get("subfolder"))
        try:
            values, kwargs = super().get_config_dict(source, **kwargs)
        except OSError as error:
            raise UserError(f"{source}: {held_checkpoints(source) or str(error).splitlines()[0]}") from error
        return native_config(values, source), kwargs


# Name of a switch -> what `add_argument` takes for its flag, whose value is None where it is unset.
SWITCHES: dict[str, dict[str, Any]] = {one.name: one.metadata["flag"] for one in fields(Self1EConfig) if one.metadata}


def held_checkpoints(source: str) -> str:
    """The checkpoints in folders of a repository of the hub, with the command that fetches one; "" without any."""
    try:
        files = HfApi().list_repo_files(source)
    except Exception:  # the hub cannot be reached, or knows no such repository
        return ""
    found = sorted(name.removesuffix("/config.json") for name in files if name.endswith("/config.json"))
    command = f"hf download {source} --include '{''.join(found[:1])}/*' --local-dir FOLDER"
    return f"several checkpoints, {', '.join(found)}; {command}" if found else ""


def check_source(source: str, subfolder: str | None = None) -> None:
    """Raise UserError for a path without a checkpoint or with pointers of Git LFS, before anything asks the hub."""
    check_utf8(source)
    folder, hub_id = Path(source, subfolder or ""), re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", source)
    if not (folder / "config.json").is_file() and (not hub_id or Path(source).parent.is_dir()):
        advice = "give a checkpoint's folder, a run's, or a hub id such as OpenGVLab/InternVL3-2B"
        raise UserError(f"{source} is no folder with a config.json; {advice}")
    for file in filter(Path.is_file, folder.glob("*")):
        check_fetched(file)


SAME_KEYS = (
    "hidden_size num_hidden_layers num_attention_heads intermediate_size hidden_act attention_dropout "
    "initializer_range norm_type layer_norm_eps image_size patch_size num_channels"
).split()
# Original InternVL vision keys -> transformers' names.
VISION_KEYS = dict(zip(SAME_KEYS, SAME_KEYS)) | {
    "qkv_bias": "attention_bias", "qk_normalization": "use_qk_norm", "dropout": "hidden_dropout_prob"
}  # fmt: skip


def of_model(values: dict, config: type[PreTrainedConfig]) -> dict:
    """Those values of a `config.json` that describe the model; others could ask to run code or read other weights."""
    known = config().to_dict().keys() | {"rope_theta", "rope_scaling"}  # older names that the library still reads
    return {name: value for name, value in values.items() if name in known}


def native_config(values: dict, source: str) -> dict:
    """Translate a `config.json` of any layout to `Self1EConfig`'s keys; UserError for another architecture."""
    kind = values.get("model_type")
    if kind not in ("internvl_chat", "internvl", "self1e"):
        raise UserError(f"{source}: model_type={kind!r}; expected an InternVL3 checkpoint or one of Self1E")
    text = values.get("llm_config") or values.get("text_config") or {"model_type": "qwen2"}
    if text.get("model_type") not in ("qwen2", "qwen3"):
        raise UserError(f"{source}: the LLM is {text.get('model_type')!r}; expected a qwen2 or qwen3 LLM")
    vision = values.get("vision_config") or {}
    weights = {name: values[flag] for flag, name in LOSS_FLAGS.items() if flag in values}
    native = of_model(values, Self1EConfig) | {"loss_weights": weights | values.get("loss_weights", {})}
    if kind == "internvl_chat":
        native["drop_path_rate"] = vision.get("drop_path_rate", 0.0)
        size = values.get("force_image_size") or vision["image_size"]
        vision = {new: vision[old] for old, new in VISION_KEYS.items() if old in vision} | {"image_size": size}
    return native | {
        "model_type": "self1e",
        "dtype": values.get("torch_dtype") or values.get("dtype"),
        "text_config": of_model(text, CONFIG_MAPPING[text["model_type"]]),
        "vision_config": of_model(vision, InternVLVisionConfig),
        "tie_word_embeddings": text.get("tie_word_embeddings", values.get("tie_word_embeddings", False)),
    }


def original_config(config: Self1EConfig) -> dict:
    """The `config.json` of layout `published` for a `Self1EConfig`: the inverse of `native_config`."""
    vision = {old: getattr(config.vision_config, new) for old, new in VISION_KEYS.items()}
    vision |= {"image_size": vision["image_size"][0], "patch_size": vision["patch_size"][0]}
    vision |= {"model_type": "intern_vit_6b", "drop_path_rate": config.drop_path_rate}
    text = config.text_config.to_dict()
    rope = text.pop("rope_parameters", None) or {}
    text["rope_theta"] = rope.pop("rope_theta", None)
    text["rope_scaling"] = rope if rope.get("rope_type", "default") != "default" else None
    return {
        "model_type": "internvl_chat",
        "architectures": ["InternVL3SELF1E"],
        "llm_config": text,
        "vision_config": vision,
        "force_image_size": config.tile_size,
        "downsample_ratio": config.downsample_ratio,
        "torch_dtype": str(config.dtype).removeprefix("torch."),
        "weights_id": config.weights_id,
        # What the original program asks for besides.
        **{"select_layer": -1, "template": "internvl2_5", "ps_version": "v2"},
        **{"dynamic_image_size": True, "use_thumbnail": True},
    }
