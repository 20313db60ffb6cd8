"""The command line for everything that is no recipe: `self1e COMMAND ...`, or `python -m self1e COMMAND ...`.

A command is one entry of `COMMANDS`. Its module is imported only when it is called, and has `main(argv) -> exit code`.
"""

import importlib
import sys
from collections.abc import Sequence

# name: (module, what it is for, arguments in front of the user's)
COMMANDS: dict[str, tuple[str, str, list[str]]] = {
    "segment": ("self1e.apps.predict", "masks for pictures and prompts", []),
    "chat": ("self1e.apps.predict", "answers about pictures, with the masks that they contain", ["--mode", "chat"]),
    "demo": ("self1e.apps.demo", "a page in the browser that segments and chats", []),
    "data": ("self1e.apps.data_get", "data get SET...: data sets brought into the tree", []),
    "check-data": ("self1e.apps.check_data", "counts and faults of the data trees or of own data", []),
    "convert": ("self1e.apps.convert", "checkpoints from one layout to another, verified", []),
    "score": ("self1e.evaluation.segmentation.compare", "figures of evaluations from their JSONL files", []),
    "card": ("self1e.training.model_card", "the model card of a checkpoint, with its scores", []),
    "ablate": ("self1e.apps.ablation.run", "variants of the method compared on synthetic scenes", []),
    "pictures": ("self1e.apps.method_pictures", "what each part of the method does to a photo", []),
    "make-shapes": ("self1e.synthetic.shapes_dataset", "a synthetic data tree in every format", []),
    "make-tiny": ("self1e.synthetic.tiny_internvl", "a tiny InternVL3 checkpoint with random weights", []),
}


def usage() -> str:
    lines = [f"  {name:<12}{purpose}" for name, (_, purpose, _) in COMMANDS.items()]
    return "usage: self1e COMMAND ...\n\ncommands:\n" + "\n".join(lines) + "\n\nself1e COMMAND --help tells more.\n"


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code, 2 when there is no such command."""
    name, *rest = [*(sys.argv[1:] if argv is None else argv), ""]
    if name in ("", "-h", "--help"):
        print(usage(), end="", file=sys.stdout if name else sys.stderr)
        return 0 if name else 2
    if name not in COMMANDS:
        print(f"self1e: there is no command {name!r}\n\n{usage()}", end="", file=sys.stderr)
        return 2
    module, _, first = COMMANDS[name]
    return importlib.import_module(module).main([*first, *rest[:-1]])
