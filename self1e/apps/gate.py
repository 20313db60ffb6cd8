"""A gate before the demo's web framework: it bounds the disk that uploads take, and answers calls of no known kind."""

import asyncio
import logging
from collections.abc import Awaitable, Callable, MutableMapping
from pathlib import Path
from typing import Any, TypeAlias

UNITS = {"kb": 10**3, "mb": 10**6, "gb": 10**9}
MARGIN = 10_000  # bytes of a form around its file
DRAINED = 10**8  # bytes of a refused upload that are read, or its sender would not see the answer
Message: TypeAlias = MutableMapping[str, Any]
logger = logging.getLogger(__name__)
Receive: TypeAlias = Callable[[], Awaitable[Message]]
Send: TypeAlias = Callable[[Message], Awaitable[None]]


def size_in_bytes(text: str) -> int:
    """30mb -> 30,000,000."""
    return int(text[:-2]) * UNITS[text[-2:]]


def bytes_in(folder: Path) -> int:
    """Bytes of all files below a folder; 0 when there is none."""
    total = 0
    for path in folder.rglob("*"):
        try:
            total += path.stat().st_size
        except FileNotFoundError:  # it has just been cleared away
            continue
    return total


class Gate:
    """An ASGI application in front of another one.

    It refuses an upload that is larger than one file may be, or for which `folder` has no space left. What the other
    application raises, as it does for a call of an unknown function, is one sentence to the client, with status 400,
    and its whole traceback in the log.

    Args:
        folder: where uploads are put; the other application removes old ones itself.
        largest: bytes of one upload. space: bytes of all uploads together, those that are under way included.
    """

    def __init__(self, app: Callable[..., Awaitable[None]], folder: Path, largest: int, space: int):
        self.app, self.folder, self.largest, self.space = app, folder, largest, space
        self.coming = 0

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
        elif scope["method"] == "POST" and scope["path"].rstrip("/").endswith("/upload"):
            await self.upload(scope, receive, send)
        else:
            await self.call(scope, receive, send)

    async def upload(self, scope: Message, receive: Receive, send: Send) -> None:
        length = dict(scope["headers"]).get(b"content-length", b"")
        if not length.isdigit():
            return await _refuse(send, 411, "An upload has to say its length.", receive)
        size = int(length)
        if size > self.largest + MARGIN:
            message = f"The file is larger than this server takes, {self.largest / 1e6:g} MB."
            return await _refuse(send, 413, message, receive)
        self.coming += size
        try:
            if await asyncio.to_thread(bytes_in, self.folder) + self.coming > self.space:
                message = "The server has no space left for pictures; try again later."
                return await _refuse(send, 507, message, receive)
            await self.call(scope, receive, send)
        finally:
            self.coming -= size

    async def call(self, scope: Message, receive: Receive, send: Send) -> None:
        started = False

        async def note(message: Message) -> None:
            nonlocal started
            started = True
            await send(message)

        try:
            await self.app(scope, receive, note)
        except Exception:  # the framework has no answer to it
            logger.exception("a call failed")
            if not started:
                await _refuse(send, 400, "The request could not be answered.")


async def _refuse(send: Send, status: int, message: str, receive: Receive | None = None) -> None:
    """Answer with a message, after reading what still comes from `receive`."""
    read = 0
    while receive is not None and read < DRAINED:
        part = await receive()
        read += len(part.get("body", b""))
        if not part.get("more_body"):
            break
    headers = [(b"content-type", b"text/plain; charset=utf-8"), (b"connection", b"close")]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": message.encode()})
