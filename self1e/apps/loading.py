"""The flags that choose a model, and a trained model loaded as they say. Shared by segment, chat, demo and plugins."""

from __future__ import annotations

import argparse
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from self1e.flags import device
from self1e.model.weights import checkpoint_folder

if TYPE_CHECKING:
    import torch

    from self1e import Self1EForSegmentation, Self1EProcessor

# torch's own names are taken, too.
PRECISIONS = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}
UNQUANTIZED = ["lm_head", "segmentation_head", "model.multi_modal_projector"]


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags that `load` takes."""
    add = parser.add_argument
    add("--version", required=True, metavar="V", type=checkpoint_folder, help="model folder, run folder or hub id")
    add(
        "--model_weights",
        metavar="W",
        type=checkpoint_folder,
        help="trained weights over --version; default: the head inside --version",
    )
    add("--device", type=device, choices=("auto", "cpu", "cuda", "mps"), default="auto")
    add(
        "--dtype",
        type=lambda name: PRECISIONS.get(name, name),
        choices=tuple(PRECISIONS.values()),
        help="default: bf16 on a CUDA GPU, else fp32",
    )
    add("--quantize", type=int, choices=(4, 8), metavar="BITS", help="4 or 8 bits per weight (bitsandbytes)")
    add("--high_res", action="store_true", help="up to 4 tiles per picture (trained with it, too)")


def quantization(bits: int, dtype: torch.dtype) -> Any:
    """bitsandbytes' 8- or 4-bit (NF4) weights for `from_pretrained(quantization_config=...)`; `dtype` computes.

    Embeddings, projector, `lm_head` and segmentation head stay as they are: they are trained in full, not by adapters.
    Raises ImportError where bitsandbytes is not installed, ValueError for other bits.
    """
    from transformers import BitsAndBytesConfig

    if bits not in (4, 8):
        raise ValueError(f"--quantize {bits}: bitsandbytes has 4 and 8 bits")
    if find_spec("bitsandbytes") is None:
        raise ImportError(f"--quantize {bits} needs bitsandbytes: pip install bitsandbytes")
    if bits == 8:
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=UNQUANTIZED)
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype, llm_int8_skip_modules=UNQUANTIZED
    )


def check_blocks(model: Self1EForSegmentation, version: str) -> None:
    """Raise ValueError where bitsandbytes could not multiply on a CPU: its 4-bit blocks hold 64 weights of one row."""
    from bitsandbytes.nn import Linear4bit

    for name, module in model.named_modules():
        if isinstance(module, Linear4bit) and module.in_features % 64:
            raise ValueError(
                f"--quantize 4 on a CPU needs widths that are multiples of 64; {name} of {version} has "
                f"{module.in_features}: use --quantize 8, or leave --quantize out"
            )


def load(
    version: str,
    weights: str | None = None,
    *,
    device: str = "auto",
    dtype: str | None = None,
    bits: int | None = None,
) -> tuple[Self1EForSegmentation, Self1EProcessor]:
    """Model and processor of a trained checkpoint, ready to predict.

    Args:
        version: folder or hub id. weights: `--model_weights` over it, or None for the head inside `version`.
        device: `auto` takes a GPU where there is one. dtype: `fp32`, `bf16` or `fp16`; the default is bf16 on a CUDA
            GPU, else fp32.
        bits: 4 or 8, see `quantization`.

    Raises:
        ValueError: no trained head, a device that is not there, weights that do not fit, or widths that 4 bits do not.
        OSError: no such checkpoint. ImportError: see `quantization`.
    """
    from self1e import Self1EForSegmentation, Self1EProcessor, distributed
    from self1e.model.config import DTYPES

    place = distributed.device(device)
    options: dict[str, Any] = {"dtype": DTYPES[dtype or ("bf16" if place.type == "cuda" else "fp32")]}
    if bits is not None:
        options |= {"quantization_config": quantization(bits, options["dtype"]), "device_map": {"": place}}
    model = Self1EForSegmentation.from_pretrained(version, weights=weights, **options)
    if not model.trained_head:
        raise ValueError(
            f"{version} is a base model without a trained segmentation head: give the trained weights with "
            "--model_weights, or a trained folder as --version"
        )
    if bits == 4 and place.type == "cpu":
        check_blocks(model, version)
    processor = Self1EProcessor.from_pretrained(version)
    return (model if bits is not None else model.to(place)).eval(), processor
