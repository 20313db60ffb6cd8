"""What asks a run to stop, and the mark by which `scripts/train_slurm.sh` puts a stopped run back into the queue."""

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

REQUEUE = 75  # exit code of a run that was asked to stop and can be continued (EX_TEMPFAIL)
SIGNALS = [getattr(signal, name) for name in ("SIGTERM", "SIGUSR1") if hasattr(signal, name)]


class Stopped(Exception):
    """A run was asked to stop and has saved what it did."""


def launchers() -> list[psutil.Process]:
    """The two processes of the deepspeed launcher; the outer one passes SIGTERM to nobody, so that we look for it."""
    return psutil.Process().parents()[:2] if "CROSS_RANK" in os.environ else []  # deepspeed sets it


@contextmanager
def stop_requests(folder: Path | None = None) -> Iterator[Callable[[], bool]]:
    """Listen to `SIGNALS`; yields what tells whether one has come, or the launcher has ended.

    folder: of a run; a block that ends by `Stopped` leaves the mark `<folder>/requeue`, and a new one removes it.
    """
    heard: list[int] = []
    started_by, mark = launchers(), folder and folder / "requeue"
    before = {number: signal.signal(number, lambda *call: heard.append(call[0])) for number in SIGNALS}
    if mark:
        mark.unlink(missing_ok=True)
    try:
        yield lambda: bool(heard) or launchers() != started_by
    except Stopped:
        if mark:
            mark.write_text("stopped on request\n")
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
