"""A web server on this machine that serves made-up files well or badly, for the tests of downloads."""

import gzip
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread


@dataclass
class Page:
    """One file and how it is served.

    cuts:     bytes after which each of the first answers breaks off
    announce: the Content-Length said, whatever is sent; None: the true one
    ranges:   "yes"; "no": always the whole file; "wrong": another part than the one asked for, once
    busy:     number of first answers that are 503
    packed:   compressed with gzip although nobody asked for it, a part as well
    """

    content: bytes = b""
    status: int = 200
    kind: str = "application/octet-stream"
    etag: str = '"1"'
    redirect: str | None = None
    cuts: list[int] = field(default_factory=list)
    announce: int | None = None
    ranges: str = "yes"
    busy: int = 0
    packed: bool = False


class Site(dict[str, Page]):
    """Pages by path; `requests` holds (path, Range header or None) of everything that was asked for."""

    address: str
    requests: list[tuple[str, str | None]]

    def url(self, path: str) -> str:
        return self.address + path


@contextmanager
def serve() -> Iterator[Site]:
    """An empty site that runs until the block ends."""
    site = Site()
    site.requests = []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *args) -> None:
            pass

        def do_GET(self) -> None:
            self.close_connection = True
            asked = self.headers.get("Range")
            site.requests.append((self.path.removeprefix("/"), asked))
            page = site.get(self.path.removeprefix("/"), Page(status=404))
            if page.redirect is not None:
                return self.head(302, {"Location": page.redirect, "Content-Length": "0"})
            if page.busy:
                page.busy -= 1
                return self.head(503, {"Content-Length": "0"})
            if page.status != 200:
                return self.head(page.status, {"Content-Length": "0"})
            start, status, headers = 0, 200, {"ETag": page.etag, "Content-Type": page.kind}
            size = len(page.content)
            same = self.headers.get("If-Range", page.etag) == page.etag
            if asked and page.ranges != "no" and same:
                start = int(re.fullmatch(r"bytes=(\d+)-", asked)[1])
                if start >= size:
                    return self.head(416, {"Content-Range": f"bytes */{size}", "Content-Length": "0"})
                if page.ranges == "wrong":
                    page.ranges, start = "yes", start - 1
                status = 206
                headers["Content-Range"] = f"bytes {start}-{size - 1}/{size}"
            body = page.content[start:]
            if page.packed:
                body, headers["Content-Encoding"] = gzip.compress(body), "gzip"
            headers["Content-Length"] = str(len(body) if page.announce is None else page.announce - start)
            if status == 206 and page.announce is not None:
                headers["Content-Range"] = f"bytes {start}-{page.announce - 1}/{page.announce}"
            self.head(status, headers)
            self.wfile.write(body[: page.cuts.pop(0)] if page.cuts else body)

        def head(self, status: int, headers: dict[str, str]) -> None:
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Connection", "close")
            self.end_headers()

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    site.address = f"http://127.0.0.1:{server.server_port}/"
    site_thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    site_thread.start()
    try:
        yield site
    finally:
        server.shutdown()
        server.server_close()
        site_thread.join()
