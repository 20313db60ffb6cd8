"""The command line: `self1e COMMAND ...`, or `python -m self1e COMMAND ...` from a checkout.

A command is one entry of a table: the module of `main(argv) -> exit code`, or MODULE:FUNCTION, imported when called.
"""

import importlib
import io
import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

from self1e.distributed import run_program
from self1e.errors import UserError

COMMANDS = {  # by name: where it is, what it makes
    "segment": ("self1e.apps.segment", "masks for photos and prompts"),
    "chat": ("self1e.apps.chat", "answers about photos, with the masks in them"),
    "demo": ("self1e.apps.demo", "a page in the browser that segments and chats"),
    "train": ("self1e.training.train", "training, as by train_hf_ivl_seq.py"),
    "eval": ("self1e.cli:evaluate", "eval segmentation RUN, eval vqa RUN: what eval_all.sh and eval_vqas.sh start"),
    "convert": ("self1e.apps.convert", "checkpoints from one layout to another, verified"),
    "export": ("self1e.apps.export", "a model as ONNX graphs, for programs without PyTorch"),
    "card": ("self1e.training.card", "the model card of a checkpoint, with its scores"),
    "check-data": ("self1e.apps.check_data", "counts and faults of the data trees or of own data"),
    "score": ("self1e.evaluation.segmentation.compare", "figures of evaluations from their JSONL files"),
}
FOR_DEVELOPERS = {
    "make-shapes": ("self1e.apps.make:shapes", "a synthetic data tree in every format"),
    "make-tiny": ("self1e.apps.make:tiny", "a tiny InternVL3 checkpoint with random weights"),
    "pictures": ("self1e.apps.pictures", "what each part of the method does to a photo"),
}


def evaluate(argv: Sequence[str]) -> int:
    """`eval segmentation|vqa [RUN] [flags]`: RUN, the folder of a run, stands for --log_base_dir and --exp_name."""
    kind, *flags = [*argv] or [""]
    if kind not in ("segmentation", "vqa"):
        print("usage: self1e eval segmentation|vqa [RUN] [flags]; self1e eval vqa --help tells more", file=sys.stderr)
        return 2
    given = {flag.split("=")[0] for flag in flags}
    if flags and not flags[0].startswith("-"):
        run = Path(flags.pop(0)).resolve()  # so that `.` has a name
        if not run.is_dir() or ("--version" not in given and not (run / "ckpt_model").is_dir()):
            raise UserError(f"{run} is no run that holds a ckpt_model; name one, or give --version V --exp_name E")
        flags += ["--log_base_dir", str(run.parent), "--exp_name", run.name]
    if kind == "vqa":
        return importlib.import_module("self1e.evaluation.vqa.run").main(flags)
    preset = ["--eval_only"] if "--val_dataset" in given else ["--eval_only", "--eval_all_datasets"]
    return importlib.import_module(COMMANDS["train"][0]).main([*preset, *flags])


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code, 2 when there is no such command."""
    for stream in (sys.stdout, sys.stderr):  # a log file gets each line at once
        if isinstance(stream, io.TextIOWrapper):  # a terminal that cannot show a letter ends no run
            stream.reconfigure(errors="backslashreplace", line_buffering=True)
    warnings.filterwarnings("ignore", "Glyph .* missing from", UserWarning)  # matplotlib draws a box in its place
    name, *rest = [*(sys.argv[1:] if argv is None else argv)] or [""]
    known = COMMANDS | FOR_DEVELOPERS
    if name not in known:
        lines = [f"  {command:<12}{text}" for command, (_, text) in known.items()]
        lines.insert(len(COMMANDS), "\nfor developers:")
        usage = "\n".join(["usage: self1e COMMAND ...\n", *lines, "\nself1e COMMAND --help tells more."])
        if name in ("-h", "--help"):
            print(usage)
            return 0
        print(f"self1e: there is no command {name!r}\n\n{usage}" if name else usage, file=sys.stderr)
        return 2
    module, _, function = known[name][0].partition(":")
    try:
        return run_program(lambda: getattr(importlib.import_module(module), function or "main")(rest))
    except BrokenPipeError:
        try:
            print(flush=True)
        except BrokenPipeError:  # whoever read our output has enough of it
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 1
        raise
