"""What a run hears from outside: signals to stop, a launcher that is gone, ranks that have stopped moving."""

import contextlib
import json
import os
import signal
import sys
import threading
import time
from pathlib import Path

import psutil

from self1e.distributed import PATIENCE, STOPS, is_main, launched, leave, rank, world_size
from self1e.files import replacing

REQUEUE = 75  # exit code of a run that was asked to stop and can be continued (EX_TEMPFAIL)


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


class Watchdog:
    """Ends a run in which nothing has moved for `timeout` seconds, with a message that names the rank and its samples.

    Each rank keeps a small file in `folder` that says what it does, since when, and that it is alive. A thread of each
    rank reads all of them: a rank that was stopped writes no more, one whose data worker hangs says that it reads.
    """

    def __init__(self, folder: Path, timeout: float):
        self.folder, self.timeout = folder, timeout
        self.doing: str | None = None
        self.since = time.time()
        self.last = "no sample yet"
        self.done = threading.Event()
        self.thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> "Watchdog":
        self.thread.start()
        return self

    def __exit__(self, *_) -> None:
        self.done.set()
        self.thread.join()
        self._path(rank()).unlink(missing_ok=True)

    def reading(self) -> None:
        """The rank waits for its data workers."""
        self._note(f"reads the samples that come after {self.last}")

    def computing(self, ids: list[str]) -> None:
        """The rank has its samples."""
        self.last = ", ".join(ids)
        self._note(f"computes {self.last}")

    def validating(self, photo: str) -> None:
        """The rank reads and answers a photo of a validation split."""
        self._note(f"validates {photo}")

    def pause(self) -> None:
        """The rank saves, scores or ends: nothing is expected to move."""
        self._note(None)

    def _note(self, doing: str | None) -> None:
        self.doing, self.since = doing, time.time()

    def _path(self, number: int) -> Path:
        return self.folder / f"rank_{number}.json"

    def _watch(self) -> None:
        while not self.done.wait(min(5.0, self.timeout / 4)):
            with contextlib.suppress(OSError):  # a full disk is the checkpoint's to report
                with replacing(self._path(rank())) as file:
                    file.write_text(json.dumps({"doing": self.doing, "since": self.since, "alive": time.time()}))
            stuck = self._stuck()
            if stuck and self.doing is not None and time.time() - self.since > self.timeout:
                if not is_main():
                    time.sleep(PATIENCE)
                lines = "\n".join(f"  {line}" for line in stuck)
                message = f"\nerror: nothing has moved for {self.timeout:g} seconds (--timeout):\n{lines}\n"
                print(message, file=sys.stderr, flush=True)
                for worker in psutil.Process().children(recursive=True):  # one that hangs would outlive this process
                    with contextlib.suppress(psutil.NoSuchProcess):
                        worker.kill()
                leave(1)

    def _stuck(self) -> list[str]:
        """The ranks at fault, with what they do; those that only wait for them are left out."""
        now = time.time()
        silent: list[str] = []
        reading: list[str] = []
        others: list[str] = []
        for number in range(world_size()):
            try:
                state = json.loads(self._path(number).read_text())
            except (OSError, ValueError):  # it has not written yet
                continue
            line = f"rank {number} {state['doing'] or 'is between two steps'}"
            if now - state["alive"] > self.timeout:
                silent.append(f"{line}, and has given no sign of life")
            elif state["doing"] is not None and now - state["since"] > self.timeout:
                (reading if state["doing"].startswith("reads") else others).append(line)
        return silent or reading or others
