"""Read the four checkpoint layouts, write two of them.

`internvl`: the original one (`internvl_chat`); `hf`: transformers' own; `published`: weights of the published SELF1E,
`internvl` plus the head and without tokenizer, given as `weights` over a base; `self1e`: our `save_pretrained`, native
names plus processor. Renaming and the split of the ViT's fused qkv are the library's conversion mapping, applied while
it streams the shards. Nothing of a checkpoint is ever run: weights are safetensors, or pickles that the library reads
with `weights_only`; classes are named here, and the chat template is the processor's own.
"""

import contextlib
import copy
import json
import re
from collections.abc import Callable
from logging import ERROR, LogRecord, getLogger
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, cast

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import Chunk, WeightConverter, WeightRenaming
from transformers.utils import logging

from self1e.files import digest, fault, read_json, replacing_folder, write_json
from self1e.model.config import DAMAGE, Self1EConfig, original_config
from self1e.model.prompts import END_OF_TURN
from self1e.model.switches import SWITCHES

HEAD, INDEX, CHECKSUMS = "segmentation_head.", "model.safetensors.index.json", "checksums.json"
SCREEN = 40  # lines; longer lists of misfits are joined by layer
PATIENCE = 5  # seconds of loading or writing weights without a progress bar
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
    version: str,
    *,
    weights: str | None = None,
    config: Self1EConfig | None = None,
    **kwargs,
) -> PreTrainedModel:
    """Load `version`, or the weights of `weights` into the model that `version` describes; see `from_pretrained`.

    A base model gets `[SEG]` and `[SEGT]` from its tokenizer and a fresh head (`trained_head` stays False).
    """
    switches = {name: kwargs.pop(name) for name in SWITCHES if name in kwargs}
    hub = {name: kwargs[name] for name in HUB_OPTIONS if name in kwargs}
    base = Self1EConfig.from_pretrained(version, **hub) if config is None else copy.deepcopy(config)
    vocabulary = None
    if base.seg_token_id is None or weights is not None:
        from self1e.model.processing import Self1EProcessor  # processing needs configuration, not the model

        tokens = Self1EProcessor.from_pretrained(version, **hub)
        base.seg_token_id, base.image_token_id = tokens.seg_token_id, tokens.image_token_id
        vocabulary = len(tokens.tokenizer)
    if weights is not None:
        trained = Self1EConfig.from_pretrained(weights, **hub)
        base.dtype = trained.dtype  # what dtype="auto" means
        if trained.seg_token_id is not None:  # ours: it knows how its head was built
            base.update({name: getattr(trained, name) for name in SWITCHES})
        base.llm.vocab_size = vocabulary
    base.update(switches)
    base.check_switches()
    source = version if weights is None else weights
    if Path(source, "adapter_config.json").is_file():  # the library would load it over the weights
        raise ValueError(f"{source} holds a PEFT adapter: merge it into the weights, or remove adapter_config.json")
    _check_index(Path(source))
    _check_bytes(Path(source))
    try:
        with quiet():
            model, report = from_pretrained(
                source, config=base, output_loading_info=True, ignore_mismatched_sizes=True, **kwargs
            )
    except (*DAMAGE, SafetensorError, UnpicklingError, EOFError) as error:
        raise ValueError(
            f"{source}: a weight file is damaged, or generation_config.json ({error}); fetch or save it again"
        ) from error
    model.round_rope()  # loading has computed the frequencies anew
    model.trained_head = _check(model, report, source, trained=weights is not None)
    if vocabulary is not None and not model.trained_head:
        _resize_vocabulary(model, vocabulary, new=[tokens.seg_token_id, tokens.segt_token_id])
    if vocabulary is not None:  # InternVL's own files name no token that ends an answer
        end, pad = tokens.tokenizer.convert_tokens_to_ids(END_OF_TURN), tokens.tokenizer.pad_token_id
        model.generation_config = GenerationConfig(eos_token_id=end, pad_token_id=pad)
    return model


def _check_index(folder: Path) -> None:
    """Raise ValueError for an index of shards that is no index, or names files outside its own folder."""
    index = folder / INDEX
    if not index.is_file():
        return
    try:
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        outside = [name for name in names if Path(name).name != name]
    except (*DAMAGE, ValueError) as error:
        raise ValueError(f"{index}: damaged ({error}); expected weight_map, a file name per weight") from error
    if outside:
        raise ValueError(f"{index}: names a file outside its folder: {outside[0]!r}")


def _check_bytes(folder: Path) -> None:
    """Raise ValueError for weight files that are not those that `save` wrote: a flipped bit is a wrong mask."""
    if not (folder / CHECKSUMS).is_file():  # another layout, or from the hub, whose client checks what it fetches
        return
    for name, expected in read_json(folder / CHECKSUMS, dict).items():
        problem = fault(folder / name, expected)
        if problem:
            advice = f"copy the checkpoint again, or delete {CHECKSUMS} if you changed the file yourself"
            raise ValueError(f"{folder / name} {problem}; {advice}")


def _check(model: PreTrainedModel, report: dict, source: str, *, trained: bool) -> bool:
    """Raise ValueError listing every key that does not fit; tell whether the checkpoint brought a trained head."""
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
        raise ValueError(
            f"{source}: {len(problems)} weights do not fit the model that its config.json (or --version) describes; "
            "nothing was loaded:\n  " + "\n  ".join(problems if len(problems) <= SCREEN else _join_layers(problems))
        )
    return not fresh and (bool(head) or trained or Self1EConfig.from_pretrained(source).seg_token_id is not None)


def _join_layers(problems: list[str]) -> list[str]:
    """Lines that differ in the layer's number alone, as one: `layers.{0-27}.mlp.up_proj.weight`."""
    layers: dict[str, list[int]] = {}
    for line in problems:
        number = re.search(r"(?<=\.)\d+(?=\.)", line)
        key = line if number is None else f"{line[: number.start()]}#{line[number.end() :]}"
        layers.setdefault(key, []).extend([] if number is None else [int(number[0])])
    return [key.replace("#", _spans(sorted(found))) for key, found in layers.items()]


def _spans(numbers: list[int]) -> str:
    """[5] -> "5", [0, 1, 2, 5] -> "{0-2,5}"."""
    spans: list[list[int]] = []
    for number in numbers:
        if spans and number == spans[-1][1] + 1:
            spans[-1][1] = number
        else:
            spans.append([number, number])
    text = ",".join(str(first) if first == last else f"{first}-{last}" for first, last in spans)
    return text if len(numbers) == 1 else "{" + text + "}"


def _resize_vocabulary(model: PreTrainedModel, size: int, *, new: list[int]) -> None:
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
    """Silence what the libraries say while they load and write weights.

    The report of loading goes because `_check` raises what it would only warn of, bars where the work is short, and
    DeepSpeed's warning of a machine without GPU, because saving asks it for its own engine alone.
    """
    level, hook = logging.get_verbosity(), logging.set_tqdm_hook(_late_bar)
    logging.set_verbosity_error()
    deepspeed = getLogger("DeepSpeed")
    deepspeed.addFilter(_is_error)
    try:
        yield
    finally:
        logging.set_verbosity(level)
        logging.set_tqdm_hook(hook)
        deepspeed.removeFilter(_is_error)


def _is_error(record: LogRecord) -> bool:
    return record.levelno >= ERROR


def _late_bar(bar: Callable, args: tuple, options: dict) -> Any:
    """A progress bar of the library that shows only where the work takes long."""
    return bar(*args, **options | {"delay": PATIENCE})


def save_checkpoint(model: PreTrainedModel, processor, folder: str | Path, *, published: bool = False) -> None:
    """Write model and processor as layout `self1e`, or `published`; the folder appears complete or not at all.

    Sizes and SHA-256 of its weight files lie beside them in `checksums.json`, which loading checks.

    Raises OSError naming the folder when the disk is full or not writable; what stood there before stays.
    """
    folder = Path(folder)
    try:
        with replacing_folder(folder) as partial:
            with quiet():
                if published:
                    _write_published(model, partial)
                else:
                    model.save_pretrained(partial)
            processor.save_pretrained(partial)
            sums = {path.name: digest(path) for path in sorted(partial.glob("*.safetensors"))}
            write_json(partial / CHECKSUMS, sums)
    except (OSError, SafetensorError) as error:
        raise OSError(f"{folder}: the checkpoint was not saved ({error}); an earlier one stays as it was") from error


def _write_published(model: PreTrainedModel, folder: Path) -> None:
    """Layout `published`, as the published code saves and reads it: original tensor names and `config.json`."""
    if model.config.mask_features != "rfa":
        raise ValueError(
            f"the layout published holds the full method only, this model has {model.config.mask_features!r}"
        )
    loaded_with = getattr(model, "_weight_conversions", None)
    library: Any = model
    library._weight_conversions = published_names()
    try:
        model.save_pretrained(folder, save_original_format=True)
    finally:
        library._weight_conversions = loaded_with
    values = original_config(cast(Self1EConfig, model.config))
    (folder / "config.json").write_text(json.dumps(values, indent=2, default=str) + "\n")
