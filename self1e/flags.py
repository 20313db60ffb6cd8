"""What the command lines of all programs share: a parser that guesses what was meant, types of flags, the last guard.

It imports nothing heavy, because `--help` and a wrong flag must be answered at once.
"""

import argparse
import difflib
import gc
import math
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn

from self1e.errors import UserError
from self1e.files import check_writable, check_writable_file  # noqa: F401

# What users can mend, hence one line on the screen; anything else is a fault of the program and shows its traceback.
EXPECTED = (UserError, ValueError, OSError, ImportError, FloatingPointError)
LARGEST = 2**31 - 1  # number that a flag takes where it names no limit: libraries count in 32 bits
INTERRUPTED = 130  # exit code after Ctrl-C, as shells have it
REQUEUE = 75  # exit code of a run that was asked to stop and can be continued (EX_TEMPFAIL)
CHOICE = re.compile(r"invalid choice: '(.*)' \(choose from (.*)\)", re.DOTALL)


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """`; did you mean X?`, or nothing where no known word is near."""
    spelled = {each.lower(): each for each in known}
    near = difflib.get_close_matches(word.lower(), spelled, n=1)
    return f"; did you mean {spelled[near[0]]}?" if near else ""


def check_known(what: str, names: Iterable[str], known: Iterable[str], *, note: str = "") -> None:
    """Raise ValueError, `<what> 'x'; known: ...`, naming those of `names` that are unknown and all that are known."""
    known = list(known)
    unknown = [name for name in names if name not in known]
    if unknown:
        hint = did_you_mean(unknown[0], known)
        raise ValueError(f"{what} {', '.join(map(repr, unknown))}; known: {', '.join(known)}{note}{hint}")


def counted(number: int, noun: str, plural: str | None = None) -> str:
    """`1 mask`, `2,000 masks`, or another plural."""
    return f"{number:,} {noun if number == 1 else plural or noun + 's'}"


def told(error: BaseException) -> str:
    """An error as users read it: one of the system as `file: what is wrong`, without its number."""
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return f"{os.fsdecode(error.filename)}: {error.strerror}"
    return str(error)


class Parser(argparse.ArgumentParser):
    """An argument parser that suggests the flag or value that was meant, and takes no abbreviated flags."""

    def __init__(self, **options: Any):
        own: dict[str, Any] = {"allow_abbrev": False, "formatter_class": argparse.RawDescriptionHelpFormatter}
        super().__init__(**own | options)

    def parse_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:  # type: ignore[override]
        known = [flag for action in self._actions for flag in action.option_strings]
        for word in sys.argv[1:] if args is None else args:
            flag = word.split("=")[0]
            if word.startswith("--") and flag not in known:  # before argparse asks for the flag that was meant
                self.error(f"there is no flag {flag}{did_you_mean(flag, known)}")
        return super().parse_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        """Exit with code 2 and one message: a usage of 70 flags would bury it, and so would the echo of every rank."""
        wrong = CHOICE.search(message)
        if wrong:
            message += did_you_mean(wrong[1], re.findall(r"[^', ]+", wrong[2]))
        first = int(os.environ.get("RANK", 0)) == 0
        self.exit(2, f"{self.prog}: error: {message}\n(see {self.prog} --help)\n" if first else None)


def whole(least: int, most: int = LARGEST) -> Callable[[str], int]:
    """A flag's type: a whole number from `least` to `most`."""
    expected = f"expected a whole number of at least {least}" + ("" if most == LARGEST else f" and at most {most}")

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r}: {expected}") from None
        if not least <= value <= most:
            raise argparse.ArgumentTypeError(
                f"{text}: {expected if value < least or most < LARGEST else f'expected at most {most}'}"
            )
        return value

    return parse


def between(low: float, high: float = math.inf, *, included: bool = False) -> Callable[[str], float]:
    """A flag's type: a number above `low`, or from it on where it is `included`, and below `high`."""
    expected = f"expected a number {'from' if included else 'above'} {low:g}{' on' if included else ''}"
    expected += "" if high == math.inf else f" and below {high:g}"

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r}: {expected}") from None
        if not (low < value < high or included and value == low):
            raise argparse.ArgumentTypeError(f"{text}: {expected}")
        return value

    return parse


def device(text: str) -> str:
    """A flag's type: a device as torch names it, and `gpu` for the one that most have."""
    return {"gpu": "cuda"}.get(text, text)


@contextmanager
def uncollected(*, lasting: bool = False) -> Iterator[None]:
    """Pause the garbage collector: it takes a fifth of the time in which torch and transformers are imported.

    lasting: what exists at the end stays for good, so that the collector never looks through it again. That is for
    programs; someone else's process may hold garbage at that moment.
    """
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if lasting:
            gc.freeze()
        if collecting:
            gc.enable()


def guarded(program: Callable[[], int]) -> int:
    """A program's exit code: 1 with one line for an error of `EXPECTED`, 130 with one line after Ctrl-C.

    A program that can say what Ctrl-C left behind raises KeyboardInterrupt with that sentence.
    """
    try:
        return program()
    except KeyboardInterrupt as stop:
        if int(os.environ.get("RANK", 0)) == 0:
            print(f"\n{stop if stop.args else 'stopped before anything was written'}", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # whoever read our output has enough of it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except EXPECTED as error:
        print(f"error: {told(error)}", file=sys.stderr)
        return 1
