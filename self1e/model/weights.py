"""Read the four checkpoint layouts, write two of them.

`internvl`: the original one (`internvl_chat`); `hf`: transformers' own; `published`: weights of the published SELF1E,
`internvl` plus the head and without tokenizer, given as `weights` over a base; `self1e`: our `save_pretrained`, native
names plus processor. Renaming and the split of the ViT's fused qkv are the library's conversion mapping, applied while
it streams the shards. Nothing of a checkpoint is ever run: weights are safetensors, or pickles that the library reads
with `weights_only`; classes are named here, and the chat template is the processor's own.
"""

import copy
import logging
import sys
import uuid
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping
from transformers.core_model_loading import Chunk, WeightConverter, WeightRenaming
from transformers.utils import cached_file
from transformers.utils.loading_report import update_key_name  # names of several layers in one

from self1e import distributed
from self1e.errors import UserError, check_known
from self1e.files import check_fetched, read_json, replacing, write_json
from self1e.model.config import LOSS_WEIGHTS, SWITCHES, Self1EConfig, original_config
from self1e.model.processor import HUB_OPTIONS, Self1EProcessor
from self1e.model.prompts import END_OF_TURN

HEAD = "segmentation_head."
# The library reads the first of these that is there: a file of all weights, or a list of its shards.
WEIGHT_FILES = [name + end for name in ("model.safetensors", "pytorch_model.bin") for end in ("", ".index.json")]
LARGE = 5 * 10**8  # bytes of weights that take seconds to read
# Applied in this order to every key, reversed on writing: (original, native).
RENAMINGS = (
    (r"^vision_model\.embeddings\.class_embedding", "model.vision_tower.embeddings.cls_token"),
    (r"^vision_model\.embeddings\.patch_embedding", "model.vision_tower.embeddings.patch_embeddings.projection"),
    (r"^vision_model\.embeddings\.position_embedding", "model.vision_tower.embeddings.position_embeddings"),
    (r"^vision_model\.encoder\.layers", "model.vision_tower.encoder.layer"),
    (r"\.attn\.proj", ".attention.projection_layer"),
    (r"\.attn\.q_norm", ".attention.q_norm"),
    (r"\.attn\.k_norm", ".attention.k_norm"),
    (r"\.norm1", ".layernorm_before"),
    (r"\.norm2", ".layernorm_after"),
    (r"\.ls1", ".lambda_1"),
    (r"\.ls2", ".lambda_2"),
    (r"^mlp1\.0", "model.multi_modal_projector.layer_norm"),
    (r"^mlp1\.1", "model.multi_modal_projector.linear_1"),
    (r"^mlp1\.3", "model.multi_modal_projector.linear_2"),
    (r"^language_model\.model", "model.language_model"),
    (r"^language_model\.lm_head", "lm_head"),
    (r"^combine_decode_proj_all", HEAD + "f_llm"),
    (r"^combine_decode_proj_ori", HEAD + "f_vit"),
    (r"^combine_decode_proj", HEAD + "f_out"),
)


def published_names() -> list[WeightRenaming | WeightConverter]:
    """`internvl` and `published` -> native names, reversible; the ViT's fused qkv holds rows of q, k, v in turn."""
    split = WeightConverter(r"\.attn\.qkv", [f".attention.{x}_proj" for x in "qkv"], operations=[Chunk(dim=0)])
    return [*(WeightRenaming(old, new) for old, new in RENAMINGS), split]


HF_NAMES = get_checkpoint_conversion_mapping("internvl")  # of the first -hf repositories
register_checkpoint_conversion_mapping("Self1EForSegmentation", [*published_names(), *HF_NAMES], overwrite=True)
# `check_fit` raises what the library would only report.
LIBRARY = logging.getLogger("transformers.modeling_utils")
LIBRARY.addFilter(lambda record: "Self1EForSegmentation LOAD REPORT" not in record.getMessage())


class CheckpointMixin:
    """Loading of all layouts and saving of ours, for `Self1EForSegmentation`."""

    @classmethod
    def from_pretrained(cls, version, *args, weights=None, config=None, loss_weights=None, **kwargs):
        """Load a checkpoint, a folder or hub id of any layout, in evaluation mode.

        A base model gets `[SEG]` and `[SEGT]` from its tokenizer and a fresh head (`trained_head` is False then).

        Args:
            weights: folder or hub id whose weights replace those of `version`.
            config: a ready `Self1EConfig`; default: the checkpoint's.
            loss_weights: those that differ from the checkpoint's, by name.
            kwargs: the library's (`dtype`, default float32, `device_map`, `attn_implementation`, ...) and any of
                `config.SWITCHES`, e.g. `mask_features="rfr"`.

        Raises UserError: no checkpoint there, another architecture, or weights that do not fit, all of them listed.
        """
        check_known("loss_weights", loss_weights or {}, LOSS_WEIGHTS)
        kwargs.setdefault("dtype", kwargs.pop("torch_dtype", torch.float32))
        switches = {name: kwargs.pop(name) for name in SWITCHES if name in kwargs}
        hub = {name: kwargs[name] for name in HUB_OPTIONS if name in kwargs}
        config = Self1EConfig.from_pretrained(version, **hub) if config is None else copy.deepcopy(config)
        source, learned = str(version if weights is None else weights), config.seg_token_id is not None
        processor: Any = None
        if weights is not None or not learned:
            processor = Self1EProcessor.from_pretrained(version, **hub)
            config.seg_token_id, config.image_token_id = processor.seg_token_id, processor.image_token_id
        if weights is not None:
            trained = Self1EConfig.from_pretrained(weights, **hub)
            config.update({name: getattr(trained, name) for name in (*SWITCHES, "loss_weights", "dtype")})
            config.text_config.vocab_size, learned = len(processor.tokenizer), True
        config.update(switches | {"loss_weights": config.loss_weights | (loss_weights or {})})
        config.check_switches()
        announce_weights(source, hub)
        kwargs |= {"output_loading_info": True, "ignore_mismatched_sizes": True}
        model, report = super().from_pretrained(source, *args, config=config, **kwargs)
        model.round_rope()  # loading has computed the frequencies anew
        head = {name for name in model.state_dict() if name.startswith(HEAD)}
        fresh = weights is None and bool(head) and head <= report["missing_keys"]
        check_fit(report, source, allowed=head if fresh else set())
        model.trained_head = not fresh and (bool(head) or learned)
        if processor is not None:
            tokenizer = processor.tokenizer
            if not model.trained_head:
                resize_vocabulary(model, len(tokenizer), new=[processor.seg_token_id, processor.segt_token_id])
            # InternVL's own files name no token that ends an answer.
            end = tokenizer.convert_tokens_to_ids(END_OF_TURN)
            model.generation_config = GenerationConfig(eos_token_id=end, pad_token_id=tokenizer.pad_token_id)
        return model

    def save_pretrained(self, save_directory, *args, **kwargs):
        """Write the layout `self1e`, with native tensor names; `save_checkpoint` also writes `published`.

        Weight files of an earlier save there are removed, and an adapter: the library would read those first.
        """
        kwargs.setdefault("save_original_format", False)
        self.config.weights_id = uuid.uuid4().hex
        for name in (*WEIGHT_FILES, "adapter_config.json"):
            Path(save_directory, name).unlink(missing_ok=True)
        super().save_pretrained(save_directory, *args, **kwargs)


def announce_weights(source: str, hub: dict[str, Any]) -> None:
    """Say that weights which take seconds are read. Raises UserError for a missing file, and for an adapter."""
    if cached_file(source, "adapter_config.json", _raise_exceptions_for_missing_entries=False, **hub):
        # The library would load it over the weights.
        raise UserError(f"{source} holds a PEFT adapter: merge it into the weights, or remove adapter_config.json")
    folder = Path(str(cached_file(source, "config.json", **hub))).parent
    files = [folder / name for name in WEIGHT_FILES if (folder / name).is_file()][:1] or [folder / WEIGHT_FILES[0]]
    if files[0].suffix == ".json":
        files = [folder / name for name in {*read_json(files[0], dict)["weight_map"].values()}]
    if Path(source).is_dir():
        for file in files:
            check_fetched(file)
    size = sum(file.stat().st_size for file in files if file.is_file())
    if size > LARGE and distributed.is_main():
        print(f"loading {source} ({size / 1e9:.1f} GB)", file=sys.stderr, flush=True)


def check_fit(report: dict[str, Any], source: str, *, allowed: set[str]) -> None:
    """Raise UserError listing every weight that does not fit. allowed: names that may be missing."""
    problems = {
        "missing": update_key_name(sorted(report["missing_keys"] - allowed)),
        "unexpected": update_key_name(sorted(report["unexpected_keys"])),
        "shape": [f"{x}: checkpoint {(*old,)}, model {(*new,)}" for x, old, new in sorted(report["mismatched_keys"])],
    }
    lines = "".join(f"\n  {kind:<11} {line}" for kind, found in problems.items() for line in found)
    if lines:
        raise UserError(f"{source}: weights do not fit its config.json (or --version), nothing was loaded:{lines}")


def resize_vocabulary(model: PreTrainedModel, size: int, *, new: list[int]) -> None:
    """Give embedding and `lm_head` exactly `size` rows; rows added and `new` start at the mean of the others."""
    before = len(model.get_input_embeddings().weight)
    model.resize_token_embeddings(size, mean_resizing=False)
    old = torch.arange(size) < before
    old[new] = False
    with torch.no_grad():
        for module in model.get_input_embeddings(), model.get_output_embeddings():  # tied, it is the same again
            weight: Any = module.weight
            weight[~old] = weight[old].float().mean(0).to(weight.dtype)


def check_published(config: Any) -> None:
    """Raise UserError where the layout `published` cannot hold the model's head."""
    if config.mask_features != "rfa":
        raise UserError("the layout published holds the full method only, mask_features rfa")


def save_checkpoint(model: Any, processor, folder: str | Path, *, published: bool = False) -> None:
    """Write model and processor as layout `self1e`, or `published`; the folder appears complete or not at all.

    What stood there before stays where saving fails. Raises UserError where `published` cannot hold the model's head.
    """
    if published:
        check_published(model.config)
    with replacing(Path(folder), folder=True) as partial:
        if published:  # whatever names the model was read under
            model._weight_conversions = published_names()
        model.save_pretrained(partial, save_original_format=published)
        if published:
            write_json(partial / "config.json", original_config(model.config), indent=2)
        processor.save_pretrained(partial)
