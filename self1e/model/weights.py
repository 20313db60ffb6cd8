"""Read the four checkpoint layouts, write two of them.

`internvl`: the original one (`internvl_chat`); `hf`: transformers' own; `published`: weights of the published SELF1E,
`internvl` plus the head and without tokenizer, given as `weights` over a base; `self1e`: our `save_pretrained`, native
names plus processor. Renaming and the split of the ViT's fused qkv are the library's conversion mapping, applied while
it streams the shards. Nothing of a checkpoint is ever run: weights are safetensors, or pickles that the library reads
with `weights_only`; classes are named here, and the chat template is the processor's own.
"""

import contextlib
import copy
import hashlib
import sys
import uuid
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import Chunk, WeightConverter, WeightRenaming
from transformers.utils import cached_file, logging
from transformers.utils.loading_report import update_key_name  # names of several layers in one

from self1e import distributed
from self1e.errors import UserError, check_known
from self1e.files import read_json, replacing, write_json
from self1e.model.config import LOSS_WEIGHTS, SWITCHES, Self1EConfig, original_config
from self1e.model.processor import HUB_OPTIONS, Self1EProcessor
from self1e.model.prompts import END_OF_TURN

HEAD = "segmentation_head."
# File of all weights -> list of its shards where there are several.
WEIGHT_FILES = {name: f"{name}.index.json" for name in ("model.safetensors", "pytorch_model.bin")}
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
# The first -hf repositories were written without the leading `model.`.
HF_PREFIXES = (("^vision_tower", "model.vision_tower"), ("^multi_modal_projector", "model.multi_modal_projector"))


def published_names() -> list[WeightRenaming | WeightConverter]:
    """`internvl` and `published` -> native names, reversible; the ViT's fused qkv holds rows of q, k, v in turn."""
    split = WeightConverter(r"\.attn\.qkv", [f".attention.{x}_proj" for x in "qkv"], operations=[Chunk(dim=0)])
    return [*(WeightRenaming(old, new) for old, new in RENAMINGS), split]


READ = [*published_names(), *(WeightRenaming(old, new) for old, new in HF_PREFIXES)]
register_checkpoint_conversion_mapping("Self1EForSegmentation", READ, overwrite=True)


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
        base = Self1EConfig.from_pretrained(version, **hub) if config is None else copy.deepcopy(config)
        processor: Any = None
        if base.seg_token_id is None or weights is not None:
            processor = Self1EProcessor.from_pretrained(version, **hub)
            base.seg_token_id, base.image_token_id = processor.seg_token_id, processor.image_token_id
        if weights is not None:
            trained = Self1EConfig.from_pretrained(weights, **hub)
            base.dtype = trained.dtype  # what dtype="auto" means
            if trained.seg_token_id is not None:  # ours: it knows how its head was built
                base.update({name: getattr(trained, name) for name in (*SWITCHES, "loss_weights")})
            base.text_config.vocab_size = len(processor.tokenizer)
        base.update(switches | {"loss_weights": base.loss_weights | (loss_weights or {})})
        base.check_switches()
        source = str(version if weights is None else weights)
        if cached_file(source, "adapter_config.json", _raise_exceptions_for_missing_entries=False, **hub):
            # The library would load it over the weights.
            raise UserError(f"{source} holds a PEFT adapter: merge it into the weights, or remove adapter_config.json")
        folder = Path(str(cached_file(source, "config.json", **hub))).parent
        files = {*folder.glob("*.safetensors"), *folder.glob("*.bin")}
        if Path(source).is_dir():
            indices = [folder / index for name, index in WEIGHT_FILES.items() if not (folder / name).is_file()]
            named = [read_json(index, dict)["weight_map"].values() for index in indices if index.is_file()]
            absent = sorted({folder / name for names in named for name in names} - files)
            if absent or not files:
                raise UserError(f"{absent[0] if absent else 'model.safetensors'} missing in {folder}: fetch them")
        size = sum(file.stat().st_size for file in files)
        if size > LARGE and distributed.is_main():
            print(f"loading {source} ({size / 1e9:.1f} GB)", file=sys.stderr, flush=True)
        kwargs |= {"output_loading_info": True, "ignore_mismatched_sizes": True}
        with quiet():
            model, report = super().from_pretrained(source, *args, config=base, **kwargs)
        model.round_rope()  # loading has computed the frequencies anew
        model.trained_head = check_fit(model, report, source, trained=weights is not None)
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
        for name in (*WEIGHT_FILES, *WEIGHT_FILES.values(), "adapter_config.json"):
            Path(save_directory, name).unlink(missing_ok=True)
        super().save_pretrained(save_directory, *args, **kwargs)


def check_fit(model: PreTrainedModel, report: dict, source: str, *, trained: bool) -> bool:
    """Raise UserError listing every weight that does not fit; tell whether the checkpoint brought a trained head."""
    missing = set(report["missing_keys"])
    head = {name for name in model.state_dict() if name.startswith(HEAD)}
    fresh = not trained and bool(head) and head <= missing
    problems = [f"missing     {line}" for line in update_key_name(sorted(missing - head if fresh else missing))]
    problems += [f"unexpected  {line}" for line in update_key_name(sorted(report["unexpected_keys"]))]
    problems += [
        f"shape       {key}: checkpoint {tuple(found)}, model {tuple(expected)}"
        for key, found, expected in sorted(report["mismatched_keys"])
    ]
    problems += [f"error       {message}" for message in report["error_msgs"]]
    if problems:
        lines = "\n  ".join(problems)
        raise UserError(f"{source}: weights do not fit its config.json (or --version), nothing was loaded:\n  {lines}")
    return not fresh and (bool(head) or trained or Self1EConfig.from_pretrained(source).seg_token_id is not None)


def resize_vocabulary(model: PreTrainedModel, size: int, *, new: list[int]) -> None:
    """Give embedding and `lm_head` exactly `size` rows; rows added and `new` start at the mean of the others."""
    before = len(model.get_input_embeddings().weight)
    model.resize_token_embeddings(size, mean_resizing=False)
    old = torch.arange(size) < before
    old[new] = False
    with torch.no_grad():
        for module in {model.get_input_embeddings(), model.get_output_embeddings()}:
            weight, own = module.weight, old.to(module.weight.device)
            weight[~own] = weight[own].float().mean(0).to(weight.dtype)  # the same again where they are tied


@contextlib.contextmanager
def quiet():
    """Silence the library's report of loading, which `check_fit` raises, and its bars where output is no terminal."""
    level = logging.get_verbosity()
    hook = logging.set_tqdm_hook(lambda bar, args, options: bar(*args, **options | {"delay": 2, "disable": None}))
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        logging.set_tqdm_hook(hook)


def save_checkpoint(model: Any, processor, folder: str | Path, *, published: bool = False) -> None:
    """Write model and processor as layout `self1e`, or `published`; the folder appears complete or not at all.

    What stood there before stays where saving fails. Raises UserError where `published` cannot hold the model's head.
    """
    if published and model.config.mask_features != "rfa":
        raise UserError("the layout published holds the full method only, mask_features rfa")
    with replacing(Path(folder), folder=True) as partial, quiet():
        if published:  # whatever names the model was read under
            model._weight_conversions = published_names()
        model.save_pretrained(partial, save_original_format=published)
        if published:
            write_json(partial / "config.json", original_config(model.config), indent=2)
        processor.save_pretrained(partial)


def checkpoint_folder(text: str) -> str:
    """The folder or hub id that `--version` and `--model_weights` mean: of a run's folder, the `ckpt_model` in it."""
    inside = Path(text, "ckpt_model")
    is_run = not Path(text, "config.json").exists() and (inside / "config.json").is_file()
    return str(inside) if is_run else text


def evaluated(run_dir: Path, version: str | None, weights: str | None) -> str | None:
    """The `--version` that an evaluation means: the run's own `ckpt_model`, unless weights over another are given."""
    own = run_dir / "ckpt_model"
    return str(own) if None in (version, weights) and (own / "config.json").is_file() else version


def weights_identity(version: str | Path, weights: str | Path | None = None) -> dict[str, str | None]:
    """What tells these weights from all others wherever they lie: `weights`, those that are loaded, and their `base`.

    A checkpoint of ours is known by the random `weights_id` of its save, one of the hub by its commit, any other by
    the names, sizes and sampled bytes of its files. `base` is None where `version` itself holds the weights.
    """
    if weights is not None:
        return weights_identity(weights) | {"base": weights_identity(version)["weights"]}
    Self1EConfig.get_config_dict(version)  # checks the folder, or asks the hub
    folder = Path(version)
    if not folder.is_dir():
        commit = Path(str(cached_file(version, "config.json"))).parent.name
        return {"weights": f"{version}@{commit}", "base": None}
    own = read_json(folder / "config.json", dict).get("weights_id")
    digest = hashlib.sha256()
    for path in sorted(p for p in folder.iterdir() if p.suffix in {".json", ".safetensors", ".bin"} and not own):
        size = path.stat().st_size
        digest.update(f"{path.name} {size}\n".encode())
        with open(path, "rb") as file:
            for start in range(0, size, max(4096, size // 64)):
                file.seek(start)
                digest.update(file.read(4096))
    return {"weights": own or digest.hexdigest()[:32], "base": None}
