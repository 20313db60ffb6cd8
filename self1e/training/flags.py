"""The parts that the command line of training is made of: its parser, the types of its values, the refused flags."""

import argparse
import difflib
import math
import os
import re

# Flags of the published program that had no effect there, or that have no meaning here.
REFUSED = {
    "vis_save_path": "pictures go to <log_base_dir>/<exp_name>/eval with --eval_visualize",
    "image_size": "the tile size is read from the checkpoint's configuration",
    "load_in_8bit": "quantised weights cannot be trained; for inference see self1e.apps.predict",
    "load_in_4bit": "quantised weights cannot be trained; for inference see self1e.apps.predict",
    "vision_pretrained": "the ViT comes with --version; there is no second vision encoder",
    "out_dim": "the head's width is the LLM's, read from the checkpoint",
    "train_mask_decoder": "there is no mask decoder; the head always trains",
    "use_mm_start_end": "<img> and </img> are part of InternVL's chat format, always",
}


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, once: a usage of 70 flags would bury it, and so would every rank's echo."""

    def error(self, message: str):
        unknown = re.match(r"unrecognized arguments: (--\w+)", message)
        value = re.match(r"argument .*: invalid choice: '(.*?)' \(choose from (.*)\)", message)
        close: list[str] = []
        if unknown:
            close = difflib.get_close_matches(unknown[1], self._option_string_actions, 1)
        elif value:
            close = difflib.get_close_matches(value[1], re.findall(r"[\w+.-]+", value[2]), 1)
        message += f"; did you mean {close[0]}?" if close else ""
        first = int(os.environ.get("RANK", 0)) == 0
        self.exit(2, f"{self.prog}: error: {message}\nall flags: {self.prog} --help\n" if first else None)


class Help(argparse.ArgumentDefaultsHelpFormatter):
    """Shows defaults where there are some; the help texts say what an unset flag means."""

    def __init__(self, prog: str):
        super().__init__(prog, max_help_position=32, width=119)

    def _get_help_string(self, action):
        return action.help if action.default is None else super()._get_help_string(action)


class Refuse(argparse.Action):
    def __call__(self, parser, namespace, values, option_string=None):
        parser.error(f"{option_string} is refused: {REFUSED[self.dest]}")


def at_least(least: int, kind: type = int):
    """The type of a flag whose value is `least` or more."""

    def convert(text: str):
        value = kind(text)
        if value < least:
            raise argparse.ArgumentTypeError(f"{text} is below {least}")
        return value

    convert.__name__ = kind.__name__  # argparse: invalid int value
    return convert


def rate(text: str) -> float:
    value = float(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is no positive number")
    return value


def fraction(text: str) -> float:
    value = float(text)
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"{text} must be in [0, 1)")
    return value
