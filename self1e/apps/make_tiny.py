"""Make a tiny InternVL3: random weights and a small tokenizer of its own, in the layout of the real checkpoints.

For the quickstart, tests and debugging: everything that reads InternVL3-2B reads this, on a CPU, in seconds.

    self1e make-tiny runs/tiny                       # 1 M parameters, 2 MB, 1 s
    self1e make-tiny runs/tiny3 --llm qwen3 --shards 3    # like InternVL3.5, in shards

Layouts (`--layout`): `internvl` is the original one (`model_type: internvl_chat`, fused `attn.qkv`, `mlp1.*`,
`language_model.*`), `hf` the one of transformers (`model_type: internvl`, the `-hf` repositories).
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from self1e.flags import Parser, between, check_writable, uncollected, whole


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(prog="self1e make-tiny", description=__doc__)
    add, size = parser.add_argument, whole(1, 4096)
    add("path", type=Path, metavar="OUTPUT", help="folder to write; a checkpoint in it is overwritten")
    add("--layout", choices=["internvl", "hf"], default="internvl")
    add("--llm", choices=["qwen2", "qwen3"], default="qwen2", help="qwen3: q/k norms, no qkv bias")
    add("--image_size", type=size, default=112, help="pixels per side of a tile")
    add("--patch_size", type=size, default=14, help="pixels per side of a patch")
    add("--width", type=size, default=96, help="LLM hidden size; its MLP is 3 times as wide")
    add("--layers", type=size, default=4, help="LLM layers")
    add("--heads", type=size, default=4, help="LLM attention heads")
    add("--kv_heads", type=size, default=2, help="LLM key/value heads")
    add("--vision_width", type=size, default=96, help="ViT hidden size; its MLP is 4 times as wide")
    add("--vision_layers", type=size, default=4)
    add("--vision_heads", type=size, default=4)
    add("--layer_scale", type=between(0), default=1.0, help="initial layer scale of the ViT's branches")
    add(
        "--drop_path_rate",
        type=between(0, 1, included=True),
        default=0.0,
        help="stochastic depth of the ViT's last layer",
    )
    add("--vocab_size", type=whole(1), default=2048, help="byte symbols and merges at most")
    add("--tie_word_embeddings", action="store_true", help="no lm_head of its own, like Qwen2 0.5B")
    add("--shards", type=size, default=1, help="weight files")
    add("--seed", type=whole(0), default=0)
    args = parser.parse_args(sys.argv[1:] if argv is None else argv)
    check_writable(args.path)
    with uncollected(lasting=True):
        from self1e.synthetic.tiny_internvl import make_tiny_internvl

    try:
        print(make_tiny_internvl(**vars(args)))
    except ValueError as error:
        parser.error(str(error))
    return 0
