"""Make synthetic data and tiny models: for the quickstart, tests and debugging, on a CPU, in seconds.

    self1e make-shapes runs/shapes                        # 2,000 + 300 scenes, 120 MB, 25 s
    self1e make-shapes runs/few --train 8 --val 3         # for a look, 1 s
    self1e make-tiny runs/tiny                            # a tiny InternVL3: 1 M parameters, 2 MB, 1 s
    self1e make-tiny runs/tiny3 --llm qwen3 --shards 3    # like InternVL3.5, in shards

`make-shapes` writes coloured shapes on photo-like backgrounds in the format of every data set: OUTPUT/dataset holds
the segmentation and conversation sets, OUTPUT/data the VQA sets. A scene is one photo with two to four shapes, no two
of the same colour and kind, which may overlap; an annotation is what is visible. No held-out photo is in a training
set. `make-tiny` writes random weights and a small tokenizer of its own in the layout of the original checkpoints
(`model_type: internvl_chat`). The same options write the same bytes.
"""

import argparse
import inspect
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from self1e.flags import Help
from self1e.synthetic.shapes_dataset import make_shapes_dataset
from self1e.synthetic.tiny_internvl import make_tiny_internvl


def run(name: str, make: Callable[..., Path], argv: Sequence[str] | None = None) -> int:
    """Call `make` with flags that are its keyword arguments, of the types of their defaults."""
    parser = argparse.ArgumentParser(f"self1e {name}", None, __doc__, formatter_class=Help, allow_abbrev=False)
    parser.add_argument("path", type=Path, metavar="OUTPUT", help="folder to write")
    for flag, parameter in list(inspect.signature(make).parameters.items())[1:]:
        default = parameter.default
        kind: dict[str, Any] = {"action": "store_true"} if isinstance(default, bool) else {"type": type(default)}
        parser.add_argument(f"--{flag}", default=default, help=type(default).__name__, **kind)
    print(f"written: {make(**vars(parser.parse_args(argv)))}")
    return 0


shapes = partial(run, "make-shapes", make_shapes_dataset)
tiny = partial(run, "make-tiny", make_tiny_internvl)
