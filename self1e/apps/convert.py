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
trained head is dropped only with `--drop_head`; the vocabulary then still holds `[SEG]` and `[SEGT]`. It takes seconds
per GB on a CPU and the memory of two models. The new folder appears only when it is whole and verified.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import torch
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

from self1e import Self1EConfig, Self1EForSegmentation, Self1EProcessor
from self1e.errors import UserError
from self1e.evaluation.results import checkpoint_folder
from self1e.files import check_utf8, check_writable, replacing, write_json
from self1e.flags import Help
from self1e.model import prompts
from self1e.model.config import of_model
from self1e.model.processor import MEAN, STD
from self1e.model.weights import HEAD, save_checkpoint
from self1e.training.card import write_card

HEADLESS = ("internvl", "hf")
LAYOUTS = (*HEADLESS, "published", "self1e")
# Of outputs, relative to the largest one: rounding depends on how tensors lie in memory.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}


def convert(source: str, target: Path, layout: str, *, version: str | None = None, drop_head: bool = False) -> None:
    """Convert. Raises RuntimeError when tensors or outputs of the copy differ; the target is not written then."""
    if target.exists():
        raise UserError(f"{target} exists; choose another folder or remove it")
    model, texts = load(source, version, "auto")
    with_head, precision = layout not in HEADLESS, model.dtype
    if model.trained_head and not (with_head or drop_head):
        raise UserError(f"layout {layout} has no place for the trained head of {source}; --drop_head leaves it out")
    if with_head and not model.trained_head:
        raise UserError(f"{source} is a base model without a head, which layout {layout} needs; train it first")
    expected = outputs(model, model.config, masks=with_head)
    with replacing(target, folder=True) as partial:
        write(model, texts, partial, layout)
        if layout == "hf":
            copy = InternVLForConditionalGeneration.from_pretrained(partial, dtype=precision)
        else:
            copy, _ = load(str(partial), None, precision)
        before, after = model.state_dict(), copy.state_dict()
        names = {name for name in before.keys() | after.keys() if with_head or not name.startswith(HEAD)}
        changed = [x for x in names if x not in before or x not in after or not before[x].equal(after[x])]
        if changed:
            raise RuntimeError(f"{len(changed)} tensors are not as in {source}, first {min(changed)}")
        difference = (outputs(copy, model.config, masks=with_head) - expected).abs().max() / expected.abs().max()
        if not difference <= TOLERANCE[precision]:
            raise RuntimeError(f"outputs differ by {difference:.1e} (relative) from {source}")
    if layout == "self1e":
        write_card(target, base_model=version)


def load(source: str, version: str | None, dtype: torch.dtype | str):
    """Model, and its processor or tokenizer. A base model keeps its vocabulary, and `[SEG]` is not added to it."""
    if version is not None:
        model = Self1EForSegmentation.from_pretrained(version, weights=source, dtype=dtype)
        return model, Self1EProcessor.from_pretrained(version)
    config = Self1EConfig.from_pretrained(source)
    if config.seg_token_id is not None:
        return Self1EForSegmentation.from_pretrained(source, dtype=dtype), Self1EProcessor.from_pretrained(source)
    config.seg_token_id = -1  # set, so that loading leaves the vocabulary alone; no token has it
    model = Self1EForSegmentation.from_pretrained(source, config=config, dtype=dtype)
    if model.trained_head:  # layout `published`, once more with its tokens
        return load(source, source, dtype)
    tokenizer = Qwen2Tokenizer.from_pretrained(source)
    model.config.image_token_id = tokenizer.convert_tokens_to_ids(prompts.IMG_CONTEXT)
    return model, tokenizer


@torch.inference_mode()
def outputs(model, config: Self1EConfig, *, masks: bool) -> Tensor:
    """Mask logits, or else vocabulary logits, of a tile of noise and 20 random bytes. config: our own model's."""
    random = torch.Generator().manual_seed(0)
    text = torch.randint(0, 256, (20,), generator=random).tolist()
    image = [config.image_token_id] * config.tile_tokens
    ids = torch.tensor([[*text[:5], *image, *text[5:], *[config.seg_token_id] * masks]])
    pixels = torch.randn(1, 3, config.tile_size, config.tile_size, generator=random)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels.to(model.dtype)}
    if isinstance(model, Self1EForSegmentation):
        inputs |= {"tile_grids": torch.tensor([[1, 1]]), "row_image": torch.tensor([0])}
    if masks:
        return model(**inputs).mask_logits[0].float()
    return model(**inputs, logits_to_keep=ids.shape[1]).logits.float()


def write(model: Self1EForSegmentation, texts, folder: Path, layout: str) -> None:
    """Write `layout`; for those without a head, the model loses it. texts: processor or tokenizer."""
    if layout not in HEADLESS:
        save_checkpoint(model, texts, folder, published=layout == "published")
        return
    tokenizer = getattr(texts, "tokenizer", texts)
    model.segmentation_head = torch.nn.Module()  # type: ignore[assignment]
    model.config.mask_features = "rfa"  # what the head was does not matter any more
    model.generation_config = GenerationConfig(
        eos_token_id=tokenizer.convert_tokens_to_ids(prompts.END_OF_TURN),
        pad_token_id=tokenizer.pad_token_id,
        suppress_tokens=prompts.never_written(tokenizer),  # as our own chat
    )
    save_checkpoint(model, tokenizer, folder, published=layout == "internvl")
    stock_processor(folder, Self1EConfig.from_pretrained(folder)).save_pretrained(folder)
    if layout == "internvl":
        config = json.loads((folder / "config.json").read_text()) | {"architectures": ["InternVLChatModel"]}
    else:
        config = of_model(model.config.to_dict(), InternVLConfig) | {"image_seq_length": model.config.tile_tokens}
        config |= {"model_type": "internvl", "architectures": ["InternVLForConditionalGeneration"]}
    write_json(folder / "config.json", config, indent=2)


def stock_processor(folder: Path, config: Self1EConfig) -> InternVLProcessor:
    """The processor that transformers' own InternVL needs, for the tokenizer in `folder`: text and tiles as ours.

    Its image tag is the image token. The model knows no videos; the padding token stands for one, as the class asks.
    """
    named = {"start_image_token": prompts.IMG_START, "end_image_token": prompts.IMG_END}
    named |= {"context_image_token": prompts.IMG_CONTEXT, "video_token": prompts.PADDING}
    tokenizer = Qwen2Tokenizer.from_pretrained(folder, extra_special_tokens=named)
    learnt = [token for token in (prompts.SEG, prompts.SEGT) if token in tokenizer.get_vocab()]
    # A pipeline leaves special tokens out of its answers, and these are part of the answer.
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in learnt])
    size = {"height": config.tile_size, "width": config.tile_size}
    images = GotOcr2ImageProcessor(size=size, image_mean=MEAN, image_std=STD, max_patches=1)
    template = prompts.CHAT_TEMPLATE.replace(prompts.IMAGE_TAG, prompts.IMG_CONTEXT)
    videos = InternVLVideoProcessor(size=size)
    return InternVLProcessor(images, tokenizer, videos, config.tile_tokens, chat_template=template)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser("self1e convert", None, __doc__, formatter_class=Help, allow_abbrev=False)
    add = parser.add_argument
    add("source", metavar="SRC", type=checkpoint_folder, help="folder or hub id, any layout")
    add("target", metavar="DST", type=Path, help="folder that does not exist yet")
    add("--layout", choices=LAYOUTS, required=True)
    add("--version", metavar="BASE", type=checkpoint_folder, help="base of published weights: gives the tokenizer")
    add("--drop_head", action="store_true", help="leave a trained head out where the layout has no place for it")
    args = parser.parse_args(argv)
    check_utf8(args.target)
    check_writable(args.target.parent)
    convert(**vars(args))
    print(f"written, with the weights of its source and outputs equal to rounding: {args.target}")
    return 0
