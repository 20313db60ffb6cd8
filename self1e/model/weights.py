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
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import Chunk, WeightConverter, WeightRenaming
from transformers.utils import cached_file, logging

from self1e import distributed
from self1e.errors import UserError, check_known
from self1e.files import replacing_folder
from self1e.model.config import LOSS_WEIGHTS, SWITCHES, Self1EConfig, check_source, original_config
from self1e.model.processor import Self1EProcessor
from self1e.model.prompts import END_OF_TURN

HEAD = "segmentation_head."
LARGE = 5 * 10**8  # bytes of weights that take seconds to read
HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "revision", "subfolder", "token")
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
_HF_PREFIXES = (("^vision_tower", "model.vision_tower"), ("^multi_modal_projector", "model.multi_modal_projector"))


def published_names() -> list[WeightRenaming | WeightConverter]:
    """`internvl` and `published` -> native names, reversible; the ViT's fused qkv holds rows of q, k, v in turn."""
    renamings = [WeightRenaming(old, new) for old, new in RENAMINGS]
    split = WeightConverter(r"\.attn\.qkv", [f".attention.{x}_proj" for x in "qkv"], operations=[Chunk(dim=0)])
    return [*renamings, split]


register_checkpoint_conversion_mapping(
    "Self1EForSegmentation",
    published_names() + [WeightRenaming(old, new) for old, new in _HF_PREFIXES],
    overwrite=True,
)


def load_checkpoint(
    cls: type[PreTrainedModel],
    from_pretrained: Callable,
    version: str | Path,
    *,
    weights: str | Path | None = None,
    config: Self1EConfig | None = None,
    loss_weights: dict[str, float] | None = None,
    **kwargs,
) -> PreTrainedModel:
    """Load `version`, or the weights of `weights` into the model that `version` describes; see `from_pretrained`.

    A base model gets `[SEG]` and `[SEGT]` from its tokenizer and a fresh head (`trained_head` stays False).
    """
    check_known("loss_weights", loss_weights or {}, LOSS_WEIGHTS)
    switches = {name: kwargs.pop(name) for name in SWITCHES if name in kwargs}
    hub = {name: kwargs[name] for name in HUB_OPTIONS if name in kwargs}
    base = Self1EConfig.from_pretrained(version, **hub) if config is None else copy.deepcopy(config)
    tokens = None
    if base.seg_token_id is None or weights is not None:
        tokens = Self1EProcessor.from_pretrained(version, **hub)
        base.seg_token_id, base.image_token_id = tokens.seg_token_id, tokens.image_token_id
    if weights is not None:
        trained = Self1EConfig.from_pretrained(weights, **hub)
        base.dtype = trained.dtype  # what dtype="auto" means
        if trained.seg_token_id is not None:  # ours: it knows how its head was built
            base.update({name: getattr(trained, name) for name in (*SWITCHES, "loss_weights")})
        base.text_config.vocab_size = len(cast(Any, tokens).tokenizer)
    base.update(switches | {"loss_weights": base.loss_weights | (loss_weights or {})})
    base.check_switches()
    source = str(version if weights is None else weights)
    check_files(source, hub)
    with quiet():
        model, report = from_pretrained(
            source, config=base, output_loading_info=True, ignore_mismatched_sizes=True, **kwargs
        )
    model.round_rope()  # loading has computed the frequencies anew
    model.trained_head = check_fit(model, report, source, trained=weights is not None)
    if tokens is not None:
        if not model.trained_head:
            resize_vocabulary(model, len(tokens.tokenizer), new=[tokens.seg_token_id, tokens.segt_token_id])
        # InternVL's own files name no token that ends an answer.
        end, pad = tokens.tokenizer.convert_tokens_to_ids(END_OF_TURN), tokens.tokenizer.pad_token_id
        model.generation_config = GenerationConfig(eos_token_id=end, pad_token_id=pad)
    return model


def check_files(source: str, hub: dict[str, Any]) -> None:
    """Look at the files of a checkpoint before the library does, and say which are loaded where that takes long.

    Raises UserError for an adapter, and for an index of shards that names missing files or files outside its folder.
    """
    if cached_file(source, "adapter_config.json", _raise_exceptions_for_missing_entries=False, **hub):
        # The library would load it over the weights.
        raise UserError(f"{source} holds a PEFT adapter: merge it into the weights, or remove adapter_config.json")
    folder = Path(source, hub.get("subfolder") or "")
    local = folder.is_dir()
    if not local:  # on the hub: what the cache holds of it
        folder = Path(str(cached_file(source, "config.json", **hub))).parent
    for index in folder.glob("*.index.json") if local else ():
        for name in json.loads(index.read_text(encoding="utf-8"))["weight_map"].values():
            if Path(name).name != name:
                raise UserError(f"{index} names a file outside its folder: {name}")
            if not (folder / name).is_file():
                raise UserError(f"{folder / name} is missing: fetch all files of the checkpoint")
    files = [*folder.glob("*.safetensors"), *folder.glob("*.bin")]
    if local and not files:
        raise UserError(f"{folder} holds no weights: fetch all files of the checkpoint")
    size = sum(path.stat().st_size for path in files)
    if size > LARGE and distributed.is_main():
        print(f"loading {source} ({size / 1e9:.1f} GB)", file=sys.stderr, flush=True)


def check_fit(model: PreTrainedModel, report: dict, source: str, *, trained: bool) -> bool:
    """Raise UserError listing every weight that does not fit; tell whether the checkpoint brought a trained head."""
    missing = set(report["missing_keys"])
    head = {name for name in model.state_dict() if name.startswith(HEAD)}
    fresh = not trained and bool(head) and head <= missing
    problems = [f"missing     {key}" for key in sorted(missing - head if fresh else missing)]
    problems += [f"unexpected  {key}" for key in sorted(report["unexpected_keys"])]
    problems += [
        f"shape       {key}: checkpoint {tuple(found)}, model {tuple(expected)}"
        for key, found, expected in sorted(report["mismatched_keys"])
    ]
    problems += [f"error       {message}" for message in report["error_msgs"]]
    if problems:
        raise UserError(
            f"{source}: {len(problems)} weights do not fit the model that its config.json (or --version) describes; "
            "nothing was loaded:\n  " + "\n  ".join(join_layers(problems))
        )
    return not fresh and (bool(head) or trained or Self1EConfig.from_pretrained(source).seg_token_id is not None)


def join_layers(lines: list[str]) -> list[str]:
    """Lines that differ in the layer's number alone, as one: `layers.{0,1,2}.mlp.up_proj.weight`."""
    layers: dict[str, list[str]] = {}
    for line in lines:
        number = (re.findall(r"(?<=\.)\d+(?=\.)", line) or [""])[0]
        layers.setdefault(line.replace(f".{number}.", ".#.", 1) if number else line, []).append(number)
    return [
        key.replace("#", numbers[0] if len(numbers) == 1 else "{" + ",".join(numbers) + "}")
        for key, numbers in layers.items()
    ]


def resize_vocabulary(model: PreTrainedModel, size: int, *, new: list[int]) -> None:
    """Give embedding and `lm_head` exactly `size` rows; rows added and `new` start at the mean of the others."""
    before = cast(Tensor, model.get_input_embeddings().weight).shape[0]
    model.resize_token_embeddings(size, mean_resizing=False)
    both = [cast(Tensor, x.weight) for x in (model.get_input_embeddings(), model.get_output_embeddings())]
    with torch.no_grad():
        for weight in {id(weight): weight for weight in both}.values():  # once where they are tied
            old = torch.arange(size, device=weight.device) < before
            old[new] = False
            weight[~old] = weight[old].float().mean(0).to(weight.dtype)


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


def save_checkpoint(model: PreTrainedModel, processor, folder: str | Path, *, published: bool = False) -> None:
    """Write model and processor as layout `self1e`, or `published`; the folder appears complete or not at all.

    What stood there before stays where saving fails. Raises UserError where `published` cannot hold the model's head.
    """
    if published and cast(Self1EConfig, model.config).mask_features != "rfa":
        raise UserError("the layout published holds the full method only, mask_features rfa")
    with replacing_folder(Path(folder)) as partial:
        with quiet():
            if published:
                write_published(model, partial)
            else:
                model.save_pretrained(partial)
        processor.save_pretrained(partial)


def write_published(model: PreTrainedModel, folder: Path) -> None:
    """Layout `published`, as the published code saves and reads it: original tensor names and `config.json`."""
    library: Any = model
    loaded_with = getattr(model, "_weight_conversions", None)
    library._weight_conversions = published_names()
    try:
        model.save_pretrained(folder, save_original_format=True)
    finally:
        library._weight_conversions = loaded_with
    values = original_config(cast(Self1EConfig, model.config))
    (folder / "config.json").write_text(json.dumps(values, indent=2, default=str) + "\n", encoding="utf-8")


def checkpoint_folder(text: str) -> str:
    """The folder or hub id that `--version` and `--model_weights` mean: of a run's folder, the `ckpt_model` in it."""
    inside = Path(text, "ckpt_model")
    is_run = not Path(text, "config.json").exists() and (inside / "config.json").is_file()
    return str(inside) if is_run else text


def weights_identity(version: str | Path, weights: str | Path | None = None) -> dict[str, str | None]:
    """What tells these weights from all others wherever they lie: `weights`, those that are loaded, and their `base`.

    A checkpoint of ours is known by the random `weights_id` of its save, one of the hub by its commit, any other by
    the names, sizes and sampled bytes of its files. `base` is None where `version` itself holds the weights.
    """
    if weights is None:
        return {"weights": identity(version), "base": None}
    return {"weights": identity(weights), "base": identity(version)}


def identity(checkpoint: str | Path) -> str:
    """See `weights_identity`. Raises UserError where there is no checkpoint."""
    check_source(str(checkpoint))
    folder = Path(checkpoint)
    if not folder.is_dir():
        return f"{checkpoint}@{Path(str(cached_file(checkpoint, 'config.json'))).parent.name}"  # the hub's commit
    own = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("weights_id")
    if own:
        return own
    digest = hashlib.sha256()
    for path in sorted(p for p in folder.iterdir() if p.suffix in {".json", ".safetensors", ".bin"}):
        size = path.stat().st_size
        digest.update(f"{path.name} {size}\n".encode())
        with open(path, "rb") as file:
            for start in range(0, size, max(4096, size // 64)):
                file.seek(start)
                digest.update(file.read(4096))
    return digest.hexdigest()[:32]
