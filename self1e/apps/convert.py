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

Cost: seconds per GB, on a CPU. Memory: one model plus its fused ViT qkv (a tenth of the 2B model): shards are streamed
in and out; of the source, digests of its tensors and its outputs on random inputs are kept (a few MB), and it is
released before the result is loaded to be compared. DST appears only when it is whole and verified.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from self1e.flags import Parser, check_writable, uncollected
from self1e.model.weights import checkpoint_folder

LAYOUTS = ("internvl", "hf", "published", "self1e")


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = Parser(prog="self1e convert", description=__doc__)
    add = parser.add_argument
    add("source", metavar="SRC", type=checkpoint_folder, help="folder or hub id, any layout")
    add("target", metavar="DST", type=Path, help="folder that does not exist yet")
    add("--layout", choices=LAYOUTS, required=True)
    add("--version", metavar="BASE", type=checkpoint_folder, help="base of published weights: gives the tokenizer")
    add("--drop_head", action="store_true", help="leave a trained head out where the layout has no place for it")
    add("--dtype", choices=("fp32", "bf16", "fp16"), help="default: as stored")
    add("--verify", action=argparse.BooleanOptionalAction, default=True, help="compare outputs on random inputs")
    args = parser.parse_args(argv)
    if args.target.exists():
        parser.error(f"{args.target} exists; choose another folder or remove it")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    args = vars(parse_args(sys.argv[1:] if argv is None else argv))
    source, target = args.pop("source"), args.pop("target")
    check_writable(target.parent)
    with uncollected(lasting=True):
        from self1e.apps.conversion import convert

    try:
        difference = convert(source, target, args.pop("layout"), **args)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"stopped; {target} was not written") from None
    verified = "its outputs were not compared with the source's"
    if difference is not None:
        outputs = f"outputs within {difference:.0e} of the largest" if difference else "equal outputs"
        verified = f"with the weights of its source and {outputs}"
    print(f"{target} is written, {verified}")
    return 0
