"""One process per GPU, as torchrun starts them, with an end that a user and a queue understand.

    self1e launch --nproc_per_node 8 train_hf_ivl_seq.py --version PATH/InternVL3-2B --exp_name NAME ...

All arguments are torchrun's (`torchrun --help`). Ctrl-C, SIGTERM and SIGUSR1 go to the ranks, which say how they end
and what is saved; torchrun would add a traceback of its own. The exit code is 130 after Ctrl-C, 75 after SIGTERM or
SIGUSR1 (the same command continues, a training with --auto_resume), and otherwise that of the first rank that failed.
A second Ctrl-C ends ranks that do not end by themselves.
"""

import contextlib
import logging
import re
import signal
import sys
import time
from collections.abc import Callable, Sequence
from typing import NoReturn

import psutil

from self1e.flags import INTERRUPTED, REQUEUE, Parser, uncollected

AGAIN = 3  # seconds after which another Ctrl-C is no impatient key but a second request


def main(argv: Sequence[str] | None = None) -> int:
    """Start the ranks and wait for all of them; returns the exit code."""
    argv = sys.argv[1:] if argv is None else argv
    parser = Parser(prog="self1e launch", usage="self1e launch [TORCHRUN'S FLAGS] PROGRAM ...", description=__doc__)
    if not argv:
        parser.error("it needs a program to start")
    if argv[0] in ("-h", "--help"):
        parser.print_help()
        return 0
    heard: dict[int, float] = {}

    def tell(number: int, frame) -> None:
        if number == signal.SIGINT and time.monotonic() - heard.setdefault(number, time.monotonic()) > AGAIN:
            number = signal.SIGKILL
        heard.setdefault(number, time.monotonic())
        logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # that ranks end is meant
        ranks = psutil.Process().children()
        for rank in ranks:
            with contextlib.suppress(psutil.NoSuchProcess):
                rank.send_signal(number)
        if not ranks:
            raise KeyboardInterrupt

    signals = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, name)]
    before = {number: signal.signal(number, tell) for number in signals}
    try:
        code = launch(argv, parser.error)
    except KeyboardInterrupt:
        if signal.SIGINT in heard:
            raise
        code = 0
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if heard:
        return INTERRUPTED if signal.SIGINT in heard else REQUEUE
    return code


def launch(argv: Sequence[str], refuse: Callable[[str], NoReturn]) -> int:
    """Run torchrun; returns the exit code of the first rank that failed (128 + N where signal N ended it), or 0.

    refuse: takes what is wrong with numbers that torchrun itself meets with a bare assertion.
    """
    with uncollected(lasting=True):
        from torch.distributed import run
        from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    flags = run.parse_args(argv)
    if not re.fullmatch(r"[1-9]\d*(:[1-9]\d*)?", flags.nnodes):
        refuse(f"--nnodes {flags.nnodes}: expected a whole number of at least 1, or a least and a most, such as 1:4")
    if re.fullmatch(r"0+|-\d+", flags.nproc_per_node):
        refuse(f"--nproc_per_node {flags.nproc_per_node}: expected a whole number of at least 1, or gpu, cpu, auto")
    try:
        run.main(["--signals_to_handle=SIGQUIT", *argv])  # the others are handled above, or end everything as usual
    except ChildFailedError as failed:
        code = failed.get_first_failure()[1].exitcode
        return code if code > 0 else 128 - code
    return 0
