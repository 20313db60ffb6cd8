"""Every number that a program takes, given as text, nan, infinite, huge and negative: refused with its flag."""

import argparse
import contextlib

import pytest

from self1e import cli
from self1e.evaluation.vqa.arguments import parse_args
from self1e.flags import Parser
from self1e.training.arguments import make_parser

JUDGED_LATER = {"--explanatory": "DataConfig", "--local_rank": "launchers write it; it is compared with LOCAL_RANK"}


COMMANDS = [name for name in cli.COMMANDS if name != "launch"]  # whose flags are torchrun's


class Found(Exception):
    """The parser of a program, at the moment it reads its flags."""


@pytest.fixture(scope="module")
def parsers() -> dict[str, Parser]:
    """program -> its parser."""

    def stop(self, *args, **options):
        raise Found(self)

    found = {"train": make_parser()}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Parser, "parse_args", stop)
        for name in [*COMMANDS, "vqa"]:
            with pytest.raises(Found) as caught:
                parse_args([]) if name == "vqa" else cli.main([name])
            found[name] = caught.value.args[0]
    return found


def number_type(action: argparse.Action) -> type | None:
    """int or float for a flag that takes one, else None."""
    for text in ("1", "2", "100", "0.5"):
        with contextlib.suppress(ValueError, argparse.ArgumentTypeError):
            kind = type(action.type(text)) if action.type else None
            return kind if kind in (int, float) else None
    return None


@pytest.mark.parametrize("program", [*COMMANDS, "train", "vqa"])
def test_bad_numbers_are_refused_with_their_flag(program, parsers, capsys):
    parser = parsers[program]
    numbers = [action for action in parser._actions if number_type(action)]
    assert numbers or program in ("convert", "export", "data", "card", "pictures")
    for action in numbers:
        flag = action.option_strings[0]
        for text in (
            "seven",
            "",
            "nan",
            "inf",
            "-1",
            "1e999",
            *(["9" * 30, "1.5"] if number_type(action) is int else []),
        ):
            if flag not in JUDGED_LATER:
                with pytest.raises(SystemExit) as stop:
                    parser.parse_args([f"{flag}={text}"])
                message = capsys.readouterr().err
                assert stop.value.code == 2 and f"argument {flag}: " in message, (flag, text, message)
