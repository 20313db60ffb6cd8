"""The flags that choose a model, and a trained model loaded as they say; shared by the commands that predict."""

import argparse
from importlib.util import find_spec
from typing import Any

from transformers import BitsAndBytesConfig

from self1e import Self1EForSegmentation, Self1EProcessor, distributed
from self1e.errors import UserError
from self1e.evaluation.results import checkpoint_folder
from self1e.flags import DTYPES, precision_on
from self1e.model.inference import check_head
from self1e.model.processor import HIGH_RES_TILES

UNQUANTIZED = ["lm_head", "segmentation_head", "model.multi_modal_projector"]  # trained in full, not by adapters


def add_model_flags(parser: argparse.ArgumentParser) -> None:
    """Flags that `load` takes."""
    # fmt: off
    add = parser.add_argument
    add("--version", required=True, metavar="V", type=checkpoint_folder, help="model folder, run folder or hub id")
    add("--model_weights", metavar="W", type=checkpoint_folder,
        help="trained weights over --version; without them the head inside --version is used")
    add("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto")
    add("--precision", choices=tuple(DTYPES), help="unset: bf16 on a CUDA GPU, else fp32")
    add("--quantize", type=int, choices=(4, 8), metavar="BITS", help="4 or 8 bits per weight (bitsandbytes)")
    add("--high_res", dest="max_tiles", action="store_const", const=HIGH_RES_TILES, default=1,
        help=f"up to {HIGH_RES_TILES} tiles per photo (trained with it, too)")
    # fmt: on


def load(args: argparse.Namespace) -> tuple[Self1EForSegmentation, Self1EProcessor]:
    """Model and processor that the flags of `add_model_flags` name, ready to predict; UserError without a head."""
    device = distributed.device(args.device)
    dtype = DTYPES[args.precision or precision_on(device)]
    options: dict[str, Any] = {"dtype": dtype}
    if args.quantize:
        if find_spec("bitsandbytes") is None:
            raise UserError(f"--quantize {args.quantize} needs bitsandbytes: pip install bitsandbytes")
        four = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": dtype}
        bits = four if args.quantize == 4 else {"load_in_8bit": True}
        config = BitsAndBytesConfig(**bits, llm_int8_skip_modules=UNQUANTIZED)
        options |= {"quantization_config": config, "device_map": {"": device}}
    model = Self1EForSegmentation.from_pretrained(args.version, weights=args.model_weights, **options)
    check_head(model)
    processor = Self1EProcessor.from_pretrained(args.version)
    return (model if args.quantize else model.to(device)).eval(), processor
