"""What asks a run to stop, and the mark by which `scripts/train_slurm.sh` puts a stopped run back into the queue."""

import os
import signal
from pathlib import Path

import psutil

REQUEUE = 75  # exit code of a run that was asked to stop and can be continued (EX_TEMPFAIL)
SIGNALS = [getattr(signal, name) for name in ("SIGTERM", "SIGUSR1") if hasattr(signal, name)]


class Stopped(Exception):
    """A run was asked to stop and has saved what it did."""


def launchers() -> list[psutil.Process]:
    """The two processes of the deepspeed launcher; the outer one passes SIGTERM to nobody, so that we look for it."""
    return psutil.Process().parents()[:2] if "CROSS_RANK" in os.environ else []  # deepspeed sets it


class StopRequest:
    """`with StopRequest() as stop:` listens to `SIGNALS`; `stop.signal` is the name of the one that came, or None.

    folder: of a run; a block that ends by `Stopped` leaves the mark `<folder>/requeue`, and a new one removes it.
    """

    heard: str | None = None

    def __init__(self, folder: Path | None = None):
        self.mark = folder and folder / "requeue"

    def __enter__(self) -> "StopRequest":
        self.launchers = launchers()
        self.before = {number: signal.signal(number, self._hear) for number in SIGNALS}
        if self.mark:
            self.mark.unlink(missing_ok=True)
        return self

    def __exit__(self, error: type[BaseException] | None, *_) -> None:
        if self.mark and error is Stopped:
            self.mark.write_text("stopped on request\n")
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _hear(self, number: int, frame) -> None:
        self.heard = signal.Signals(number).name

    @property
    def signal(self) -> str | None:
        return self.heard or (None if launchers() == self.launchers else "the end of the launcher")
