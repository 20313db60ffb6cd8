"""Convert a checkpoint between its four layouts, and prove it: the same bits in every tensor, the same outputs.

    self1e convert runs/exp/ckpt_model out --layout published
    self1e convert trained_self1e out --layout self1e --version OpenGVLab/InternVL3-2B
    self1e convert OpenGVLab/InternVL3-2B out --layout hf

| --layout  | what                                                       | read by                                   |
|-----------|------------------------------------------------------------|-------------------------------------------|
| internvl  | original InternVL, without the head                        | this project; with its code files, theirs |
| hf        | transformers' own InternVL (-hf), without the head         | stock InternVLForConditionalGeneration    |
| published | as the published SELF1E code saves and reads (full method) | this project and theirs                   |
| self1e    | ours: native names, processor, model card                  | this project, Auto classes after import   |

The source's layout is recognised; published weights carry no tokenizer, so they need their base as `--version`. A
trained head is dropped only with `--drop_head`; the vocabulary then still holds `[SEG]` and `[SEGT]`. Weights keep
their precision unless `--dtype` says otherwise.

Cost: seconds a GB, on a CPU. Memory: one model plus its fused ViT qkv (a tenth of the 2B model): shards are streamed
in and out; of the source, digests of its tensors and its outputs on random inputs are kept (a few MB), and it is
released before the result is loaded to be compared. DST appears only when it is whole and verified.
"""

import argparse
import gc
import hashlib
import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import InternVLConfig, InternVLForConditionalGeneration, Qwen2Tokenizer
from transformers.utils import cached_file

from self1e import Self1EConfig, Self1EForSegmentation, Self1EProcessor
from self1e.model import checkpoints
from self1e.model.configuration import DTYPES
from self1e.model.prompts import IMG_CONTEXT
from self1e.training.model_card import write_model_card

LAYOUTS = ("internvl", "hf", "published", "self1e")
HEADLESS = ("internvl", "hf")
# Of outputs, relative to the largest one: rounding depends on how tensors lie in memory.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}


def tensor_names(source: str) -> set[str]:
    """Names of a checkpoint's tensors, without reading them. Raises ValueError where there are no safetensors."""
    absent_is_fine = {"_raise_exceptions_for_missing_entries": False}
    index = cached_file(source, "model.safetensors.index.json", **absent_is_fine)
    if index is not None:
        return set(json.loads(Path(index).read_text())["weight_map"])
    single = cached_file(source, "model.safetensors", **absent_is_fine)
    if single is None:
        raise ValueError(f"{source}: neither model.safetensors nor model.safetensors.index.json there")
    with safe_open(single, framework="pt") as file:
        return set(file.keys())


def load(source: str, version: str | None, dtype: torch.dtype | str):
    """Model and tokenizer or processor. A base model keeps its vocabulary, `[SEG]` is not added, and has no head."""
    if version is not None:
        model = Self1EForSegmentation.from_pretrained(version, weights=source, dtype=dtype)
        return model, Self1EProcessor.from_pretrained(version)
    config = Self1EConfig.from_pretrained(source)
    has_head = any(name.startswith(("combine_decode_proj", checkpoints.HEAD)) for name in tensor_names(source))
    if has_head or config.seg_token_id is not None:
        processor = Self1EProcessor.from_pretrained(source)  # first: it tells when --version is needed
        return Self1EForSegmentation.from_pretrained(source, dtype=dtype), processor
    tokenizer = Qwen2Tokenizer.from_pretrained(source)
    config.image_token_id = tokenizer.convert_tokens_to_ids(IMG_CONTEXT)
    config.seg_token_id = -1  # set, so that loading leaves the vocabulary alone; no token has it
    return Self1EForSegmentation.from_pretrained(source, config=config, dtype=dtype), tokenizer


def probe(config: Self1EConfig, *, with_seg: bool) -> dict[str, Tensor]:
    """Random inputs: a tile of noise, its image tokens, 20 byte tokens and, `with_seg`, a `[SEG]` after them."""
    random = torch.Generator().manual_seed(0)
    text = torch.randint(0, 256, (20,), generator=random).tolist()
    ids = text[:5] + [config.image_token_id] * config.tile_tokens + text[5:] + [config.seg_token_id] * with_seg
    return {
        "input_ids": torch.tensor([ids]),
        "attention_mask": torch.ones(1, len(ids), dtype=torch.long),
        "pixel_values": torch.randn(1, 3, config.tile_size, config.tile_size, generator=random),
    }


@torch.inference_mode()
def outputs(model, inputs: dict[str, Tensor]) -> list[Tensor]:
    """Vocabulary logits of every position and, from our model, mask logits where the inputs hold `[SEG]`."""
    if not isinstance(model, Self1EForSegmentation):
        inputs = inputs | {"pixel_values": inputs["pixel_values"].to(model.dtype)}
        return [model(**inputs).logits.float()]
    one = {"tile_grids": torch.tensor([[1, 1]]), "row_image": torch.tensor([0])}
    out = model(**inputs, **one, logits_to_keep=inputs["input_ids"].shape[1])
    return [x.float() for x in (out.logits, *out.mask_logits) if len(x)]


def digests(model, *, with_head: bool) -> dict[str, bytes]:
    """A hash of each tensor's bytes, by native name."""
    return {
        name: hashlib.blake2b(tensor.detach().contiguous().flatten().view(torch.uint8).numpy()).digest()
        for name, tensor in model.state_dict().items()
        if with_head or not name.startswith(checkpoints.HEAD)
    }


def write(model: Self1EForSegmentation, texts, folder: Path, layout: str) -> None:
    """Write `layout`; for those without a head, the model loses it. texts: processor or tokenizer."""
    if layout in HEADLESS:
        model.segmentation_head = torch.nn.Module()
        model.config.mask_features = "rfa"  # what the head was does not matter any more
        checkpoints.save(model, getattr(texts, "tokenizer", texts), folder, published=layout == "internvl")
    else:
        checkpoints.save(model, texts, folder, published=layout == "published")
    config = json.loads((folder / "config.json").read_text())
    if layout == "internvl":
        config["architectures"] = ["InternVLChatModel"]
    elif layout == "hf":
        known = InternVLConfig().to_dict().keys() - {"model_type", "architectures", "transformers_version"}
        values = {name: value for name, value in model.config.to_dict().items() if name in known}
        values["image_seq_length"] = model.config.tile_tokens
        config = InternVLConfig(**values, architectures=["InternVLForConditionalGeneration"]).to_dict()
    else:
        return
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def reload(folder: Path, layout: str, dtype: torch.dtype):
    """The written checkpoint as its readers load it."""
    if layout == "hf":
        return InternVLForConditionalGeneration.from_pretrained(folder, dtype=dtype).eval()
    return load(str(folder), None, dtype)[0]


def convert(
    source: str,
    target: Path,
    layout: str,
    *,
    version: str | None = None,
    drop_head: bool = False,
    dtype: str | None = None,
    verify: bool = True,
) -> float | None:
    """Convert; see the top of the file. Returns the largest relative difference found, None without `verify`.

    Raises ValueError when the target exists, a head would be lost unasked or invented, weights do not fit, or tensors
    or outputs differ; the target is not written then.
    """
    if target.exists():
        raise ValueError(f"{target} exists; choose another folder or remove it")
    model, texts = load(source, version, DTYPES[dtype] if dtype else "auto")
    if layout in HEADLESS and model.trained_head and not drop_head:
        raise ValueError(f"layout {layout} has no place for the trained head of {source}; --drop_head leaves it out")
    if layout not in HEADLESS and not model.trained_head:
        raise ValueError(f"{source} is a base model without a head, which layout {layout} needs; train it first")
    with_head, precision = layout not in HEADLESS, model.dtype
    inputs = probe(model.config, with_seg=with_head)
    if verify:
        expected, stored = outputs(model, inputs), digests(model, with_head=with_head)
    partial = target.with_name(f".{target.name}.converting")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        write(model, texts, partial, layout)
        del model
        gc.collect()
        difference = None
        if verify:
            converted = reload(partial, layout, precision)
            found, written = outputs(converted, inputs), digests(converted, with_head=with_head)
            changed = sorted(name for name in stored.keys() | written.keys() if stored.get(name) != written.get(name))
            if changed:
                first = f"{len(changed)} tensors, {changed[0]} first,"
                raise ValueError(f"{first} are not as in {source}; nothing was written")
            ratios = [(a - b).abs().max() / a.abs().max() for a, b in zip(expected, found, strict=True)]
            difference = max(ratio.item() for ratio in ratios)
            if not difference <= TOLERANCE[precision]:
                raise ValueError(f"outputs differ by {difference:.1e} (relative) from {source}; nothing was written")
        if layout == "self1e":
            partial = write_model_card(partial, base=version, title=target.name).parent
        partial.rename(target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return difference


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("source", metavar="SRC", help="folder or hub id, any layout")
    add("target", metavar="DST", type=Path, help="folder that does not exist yet")
    add("--layout", choices=LAYOUTS, required=True)
    add("--version", metavar="BASE", help="base of published weights: gives the tokenizer")
    add("--drop_head", action="store_true", help="leave a trained head out where the layout has no place for it")
    add("--dtype", choices=DTYPES, help="default: as stored")
    add("--verify", action=argparse.BooleanOptionalAction, default=True, help="compare outputs on random inputs")
    args = vars(parser.parse_args(argv))
    try:
        difference = convert(args.pop("source"), args.pop("target"), args.pop("layout"), **args)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    verified = "not verified" if difference is None else f"the same weights, outputs within {difference:.0e}"
    print(f"converted, {verified}")
    return 0
