"""Checkpoints from one layout to another, proved: the work of `self1e convert`, which describes it."""

import gc
import hashlib
import json
import shutil
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import (
    AddedToken,
    GenerationConfig,
    GotOcr2ImageProcessor,
    InternVLConfig,
    InternVLForConditionalGeneration,
    InternVLProcessor,
    InternVLVideoProcessor,
    Qwen2Tokenizer,
)
from transformers.utils import cached_file

from self1e import Self1EConfig, Self1EForSegmentation, Self1EProcessor
from self1e.files import write_json
from self1e.model.config import DTYPES
from self1e.model.processor import CHAT_TEMPLATE, MEAN, STD
from self1e.model.prompts import END_OF_TURN, IMAGE_TAG, IMG_CONTEXT, IMG_END, IMG_START, PADDING, SEG, SEGT
from self1e.model.weights import HEAD, quiet, save_checkpoint
from self1e.training.model_card import write_model_card

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
    has_head = any(name.startswith(("combine_decode_proj", HEAD)) for name in tensor_names(source))
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
        if with_head or not name.startswith(HEAD)
    }


def stock_processor(folder: Path, config: Self1EConfig) -> InternVLProcessor:
    """The processor that transformers' own InternVL needs, for the tokenizer in `folder`: text and tiles as ours.

    Its image tag is the image token. It cuts a photo into tiles when it is called with `max_patches`. The model knows
    no videos; the padding token stands where the class wants a token for them.
    """
    named = {"start_image_token": IMG_START, "end_image_token": IMG_END, "context_image_token": IMG_CONTEXT}
    tokenizer = Qwen2Tokenizer.from_pretrained(folder, extra_special_tokens=named | {"video_token": PADDING})
    learnt = [token for token in (SEG, SEGT) if token in tokenizer.get_vocab()]
    # A pipeline leaves special tokens out of its answers, and these are part of the answer.
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in learnt])
    size = {"height": config.tile_size, "width": config.tile_size}
    images = GotOcr2ImageProcessor(size=size, image_mean=MEAN, image_std=STD, max_patches=1)
    template = CHAT_TEMPLATE.replace(IMAGE_TAG, IMG_CONTEXT)
    return InternVLProcessor(
        images, tokenizer, InternVLVideoProcessor(size=size), image_seq_length=config.tile_tokens,
        chat_template=template,
    )  # fmt: skip


def write(model: Self1EForSegmentation, texts, folder: Path, layout: str) -> None:
    """Write `layout`; for those without a head, the model loses it. texts: processor or tokenizer."""
    if layout not in HEADLESS:
        save_checkpoint(model, texts, folder, published=layout == "published")
        return
    tokenizer = getattr(texts, "tokenizer", texts)
    model.segmentation_head = torch.nn.Module()  # type: ignore[assignment]
    model.config.mask_features = "rfa"  # what the head was does not matter any more
    model.generation_config = GenerationConfig(
        eos_token_id=tokenizer.convert_tokens_to_ids(END_OF_TURN),
        pad_token_id=tokenizer.pad_token_id,
        suppress_tokens=[tokenizer.convert_tokens_to_ids(IMG_CONTEXT)],  # as our own chat
    )
    save_checkpoint(model, tokenizer, folder, published=layout == "internvl")
    stock_processor(folder, Self1EConfig.from_pretrained(folder)).save_pretrained(folder)
    if layout == "internvl":
        config = json.loads((folder / "config.json").read_text()) | {"architectures": ["InternVLChatModel"]}
    else:
        known = InternVLConfig().to_dict().keys() - {"model_type", "architectures", "transformers_version"}
        values = {name: value for name, value in model.config.to_dict().items() if name in known}
        values["image_seq_length"] = model.config.tile_tokens
        config = InternVLConfig(**values, architectures=["InternVLForConditionalGeneration"]).to_dict()
    write_json(folder / "config.json", config, indent=2)


def reload(folder: Path, layout: str, dtype: torch.dtype):
    """The written checkpoint as its readers load it."""
    if layout == "hf":
        with quiet():
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
