"""The command line for everything that is no recipe: `self1e COMMAND ...`, or `python -m self1e COMMAND ...`.

A command is one entry of `COMMANDS`. Its module is imported only when it is called, reads its flags before it imports
anything heavy, and has `main(argv) -> exit code`.
"""

import importlib
import sys
from collections.abc import Sequence
from typing import NamedTuple

from self1e.flags import did_you_mean, guarded


class Command(NamedTuple):
    """module: has `main`. purpose: in the list of commands. preset: arguments in front of the user's."""

    module: str
    purpose: str
    preset: tuple[str, ...] = ()


COMMANDS = {
    "segment": Command("self1e.apps.predict", "masks for pictures and prompts"),
    "chat": Command("self1e.apps.predict", "answers about pictures, with the masks in them", ("--mode", "chat")),
    "demo": Command("self1e.apps.demo", "a page in the browser that segments and chats"),
    "export": Command("self1e.apps.export", "predictions as a COCO data set or for Label Studio"),
    "check-data": Command("self1e.apps.check_data", "counts and faults of the data trees or of own data"),
    "convert": Command("self1e.apps.convert", "checkpoints from one layout to another, verified"),
    "score": Command("self1e.evaluation.segmentation.compare", "figures of evaluations from their JSONL files"),
    "launch": Command("self1e.apps.launch", "training or an evaluation on several GPUs: torchrun with a clean end"),
    "card": Command("self1e.training.model_card", "the model card of a checkpoint, with its scores"),
    "pictures": Command("self1e.apps.method_pictures", "what each part of the method does to a photo"),
    "make-shapes": Command("self1e.apps.make_shapes", "a synthetic data tree in every format"),
    "make-tiny": Command("self1e.apps.make_tiny", "a tiny InternVL3 checkpoint with random weights"),
}


def usage() -> str:
    lines = [f"  {name:<12}{command.purpose}" for name, command in COMMANDS.items()]
    return "usage: self1e COMMAND ...\n\ncommands:\n" + "\n".join(lines) + "\n\nself1e COMMAND --help tells more.\n"


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code, 2 when there is no such command."""
    name, *rest = [*(sys.argv[1:] if argv is None else argv)] or [""]
    if name in ("", "-h", "--help"):
        print(usage(), end="", file=sys.stdout if name else sys.stderr)
        return 0 if name else 2
    if name not in COMMANDS:
        print(
            f"self1e: there is no command {name!r}{did_you_mean(name, COMMANDS)}\n\n{usage()}", end="", file=sys.stderr
        )
        return 2
    command = COMMANDS[name]
    return guarded(lambda: importlib.import_module(command.module).main([*command.preset, *rest]))
