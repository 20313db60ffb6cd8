"""Training runs and evaluations in which nothing moves any more end, and name the rank and its samples."""

import contextlib
import json
import sys
import threading
import time
from pathlib import Path

import psutil

from self1e.distributed import PATIENCE, is_main, leave, rank, world_size
from self1e.files import replacing


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
        with contextlib.suppress(OSError):  # other ranks still have files in it
            self.folder.rmdir()

    def reading(self, what: str | None = None) -> None:
        """The rank waits for its data workers, for what comes next in training or for `what` in an evaluation."""
        self._note(f"reads {what or f'the samples that come after {self.last}'}")

    def computing(self, ids: list[str]) -> None:
        """The rank has its samples."""
        self.last = ", ".join(ids)
        self._note(f"computes {self.last}")

    def waiting(self) -> None:
        """The rank has done its share, however long the others take for theirs."""
        self._note("waits for the other ranks")

    def pause(self) -> None:
        """The rank loads, saves, scores or ends: nothing is expected to move."""
        self._note(None)

    def _note(self, doing: str | None) -> None:
        self.doing, self.since = doing, time.time()

    def _path(self, number: int) -> Path:
        return self.folder / f"rank_{number}.json"

    def _watch(self) -> None:
        self._tell()
        while not self.done.wait(min(5.0, self.timeout / 4)):
            self._tell()
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

    def _tell(self) -> None:
        with contextlib.suppress(OSError):  # a full disk is the checkpoint's to report
            with replacing(self._path(rank())) as file:
                file.write_text(json.dumps({"doing": self.doing, "since": self.since, "alive": time.time()}))

    def _stuck(self) -> list[str]:
        """The ranks at fault, with what they do; those that only wait for them are left out."""
        now = time.time()
        silent: list[str] = []
        reading: list[str] = []
        computing: list[str] = []
        for number in range(world_size()):
            try:
                state = json.loads(self._path(number).read_text())
            except (OSError, ValueError):  # it has not written yet
                continue
            doing = state["doing"] or "is between two steps"
            if now - state["alive"] > self.timeout / 2:  # at least two signs are missing
                silent.append(f"rank {number} {doing}, and has given no sign of life")
            elif doing.startswith(("reads", "computes")) and now - state["since"] > self.timeout:
                (reading if doing.startswith("reads") else computing).append(f"rank {number} {doing}")
        return silent or reading or computing
