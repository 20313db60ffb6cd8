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
their precision unless `--dtype` says otherwise. It takes seconds per GB on a CPU and the memory of one model. The new
folder appears only when it is whole and verified.
"""

import argparse
import gc
import hashlib
import json
import sys
from collections.abc import Sequence
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
from self1e.errors import UserError
from self1e.files import check_writable, replacing_folder, write_json
from self1e.model.config import DTYPES
from self1e.model.processor import CHAT_TEMPLATE, MEAN, STD
from self1e.model.prompts import END_OF_TURN, IMAGE_TAG, IMG_CONTEXT, IMG_END, IMG_START, PADDING, SEG, SEGT
from self1e.model.weights import HEAD, checkpoint_folder, quiet, save_checkpoint
from self1e.training.card import write_card

LAYOUTS = ("internvl", "hf", "published", "self1e")
HEADLESS = ("internvl", "hf")
# Of outputs, relative to the largest one: rounding depends on how tensors lie in memory.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}


def convert(
    source: str,
    target: Path,
    layout: str,
    *,
    version: str | None = None,
    drop_head: bool = False,
    dtype: str | None = None,
) -> float:
    """Convert; see the top of the file. Returns the largest difference of outputs, relative to the largest output.

    Raises UserError when the target exists, a head would be lost unasked or invented, or weights do not fit, and
    RuntimeError when tensors or outputs of the copy differ; the target is not written then.
    """
    if target.exists():
        raise UserError(f"{target} exists; choose another folder or remove it")
    model, texts = load(source, version, DTYPES[dtype] if dtype else "auto")
    with_head, precision = layout not in HEADLESS, model.dtype
    if model.trained_head and not (with_head or drop_head):
        raise UserError(f"layout {layout} has no place for the trained head of {source}; --drop_head leaves it out")
    if with_head and not model.trained_head:
        raise UserError(f"{source} is a base model without a head, which layout {layout} needs; train it first")
    inputs = probe(model.config, with_seg=with_head)
    expected, stored = outputs(model, inputs), digests(model, with_head=with_head)
    with replacing_folder(target) as partial:
        write(model, texts, partial, layout)
        del model  # the copy takes its place in memory
        gc.collect()
        if layout == "hf":
            with quiet():
                copy = InternVLForConditionalGeneration.from_pretrained(partial, dtype=precision).eval()
        else:
            copy = load(str(partial), None, precision)[0]
        written = digests(copy, with_head=with_head)
        changed = sorted(name for name in stored.keys() | written.keys() if stored.get(name) != written.get(name))
        if changed:
            raise RuntimeError(f"{len(changed)} tensors are not as in {source}, first {changed[0]}")
        pairs = zip(expected, outputs(copy, inputs), strict=True)
        difference = max(((a - b).abs().max() / a.abs().max()).item() for a, b in pairs)
        if not difference <= TOLERANCE[precision]:
            raise RuntimeError(f"outputs differ by {difference:.1e} (relative) from {source}")
        if layout == "self1e":
            write_card(partial, title=target.name, base_model=version)
    return difference


def load(source: str, version: str | None, dtype: torch.dtype | str):
    """Model, and its processor or tokenizer. A base model keeps its vocabulary, and `[SEG]` is not added to it."""
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


def tensor_names(source: str) -> set[str]:
    """Names of a checkpoint's tensors, without reading them."""
    if index := cached_file(source, "model.safetensors.index.json", _raise_exceptions_for_missing_entries=False):
        return set(json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"])
    with safe_open(cached_file(source, "model.safetensors"), framework="pt") as file:
        return set(file.keys())


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
        return [model(**inputs | {"pixel_values": inputs["pixel_values"].to(model.dtype)}).logits.float()]
    one = {"tile_grids": torch.tensor([[1, 1]]), "row_image": torch.tensor([0])}
    out = model(**inputs, **one, logits_to_keep=inputs["input_ids"].shape[1])
    return [x.float() for x in (out.logits, *(out.mask_logits or ())) if len(x)]


def digests(model, *, with_head: bool) -> dict[str, bytes]:
    """A hash of each tensor's bytes, by native name."""
    return {
        name: hashlib.blake2b(tensor.detach().contiguous().flatten().view(torch.uint8).numpy()).digest()
        for name, tensor in model.state_dict().items()
        if with_head or not name.startswith(HEAD)
    }


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


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="self1e convert",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("source", metavar="SRC", type=checkpoint_folder, help="folder or hub id, any layout")
    add("target", metavar="DST", type=Path, help="folder that does not exist yet")
    add("--layout", choices=LAYOUTS, required=True)
    add("--version", metavar="BASE", type=checkpoint_folder, help="base of published weights: gives the tokenizer")
    add("--drop_head", action="store_true", help="leave a trained head out where the layout has no place for it")
    add("--dtype", choices=tuple(DTYPES), help="default: as stored")
    args = vars(parser.parse_args(sys.argv[1:] if argv is None else argv))
    check_writable(args["target"].parent)
    difference = convert(args.pop("source"), args.pop("target"), args.pop("layout"), **args)
    outputs_are = f"outputs within {difference:.0e} of the largest" if difference else "equal outputs"
    print(f"written, with the weights of its source and {outputs_are}")
    return 0
