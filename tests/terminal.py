"""Programs in a terminal of their own, where Ctrl-C is typed as a user types it."""

import fcntl
import os
import select
import signal
import subprocess
import termios
import time
from pathlib import Path

from helpers import hear_ctrl_c

CTRL_C = b"\x03"


def _in_terminal() -> None:
    """For `preexec_fn`: make the terminal of the standard streams the one whose Ctrl-C the process hears."""
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
    hear_ctrl_c()


class Terminal:
    """A command that runs in a pseudo-terminal. `printed`: what was read of it so far."""

    def __init__(self, command: list, *, environment: dict[str, str], folder: Path):
        self.own, other = os.openpty()
        self.printed = ""
        self.process = subprocess.Popen(
            [*map(str, command)], stdin=other, stdout=other, stderr=other, env=os.environ | environment, cwd=folder,
            start_new_session=True, preexec_fn=_in_terminal,
        )  # fmt: skip
        os.close(other)

    def read_until(self, text: str | None, *, timeout: float) -> str:
        """Everything up to the end of the output, or to where `text` has been printed; at most `timeout` seconds."""
        end = time.monotonic() + timeout
        while text is None or text not in self.printed:
            if not select.select([self.own], [], [], max(0, end - time.monotonic()))[0]:
                os.killpg(self.process.pid, signal.SIGKILL)
                raise AssertionError(f"{text!r} did not come within {timeout:g} s:\n{self.printed}")
            try:
                part = os.read(self.own, 65536)
            except OSError:  # Linux reports the end of a terminal so
                part = b""
            if not part:
                assert text is None, f"{text!r} never came:\n{self.printed}"
                break
            self.printed += part.decode(errors="replace").replace("\r\n", "\n")
        return self.printed

    def type(self, keys: bytes) -> None:
        os.write(self.own, keys)

    def finish(self, *, timeout: float = 400) -> tuple[int, str]:
        """Wait for the end; returns the exit code and all that was printed."""
        self.read_until(None, timeout=timeout)
        code = self.process.wait(timeout=timeout)
        os.close(self.own)
        return code, self.printed
