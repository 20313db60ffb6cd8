"""What a run hears from outside: signals to stop, and that the launcher above it is gone."""

import os
import signal
import sys

import psutil

from self1e.distributed import STOPS, launched
from self1e.flags import REQUEUE


class StopRequest:
    """Whether this process was asked to stop: by SIGTERM, by SIGUSR1, or by the end of the launcher above it.

    It listens to signals inside its `with` block.

    The DeepSpeed launcher is two processes; SIGTERM ends the outer one without a word to the inner one, so that the
    inner one's parent tells.
    """

    def __init__(self) -> None:
        self.signal: str | None = None
        self.armed = False
        self.ancestors = self._ancestors()

    def __enter__(self) -> "StopRequest":
        self.before = {number: signal.signal(number, self._hear) for number in STOPS}
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self.before.items():
            if signal.getsignal(number) == self._hear:  # else they are ignored: Ctrl-C ends the run already
                signal.signal(number, handler)

    def _hear(self, number: int, frame) -> None:
        self.signal = signal.Signals(number).name
        if not self.armed:  # there is no step to wait for: nothing is being trained
            message = f"\nstopped by {self.signal} outside the training steps; continue with --auto_resume"
            print(message, file=sys.stderr, flush=True)
            os._exit(REQUEUE)

    @staticmethod
    def _ancestors() -> tuple[int, ...]:
        if not launched():
            return ()
        parent = os.getppid()
        try:
            return parent, psutil.Process(parent).ppid()
        except psutil.NoSuchProcess:
            return (parent,)

    @property
    def cause(self) -> str | None:
        """The name of the signal, "the end of the launcher", or None."""
        if self.signal is None and self._ancestors() != self.ancestors:
            self.signal = "the end of the launcher"
        return self.signal
