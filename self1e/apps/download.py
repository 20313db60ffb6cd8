"""Download a file over HTTP: it is whole and checked when it bears its name, and continued after an interruption.

What has arrived lies beside the target under a hidden name that ends in `.part`, one for each address, so that two
mirrors are never mixed. A continued download asks for the rest (`Range`), and for all of it where the file changed
meanwhile (`If-Range`) or the server cannot continue.
"""

import hashlib
import json
import re
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import requests
from requests.adapters import HTTPAdapter
from tqdm import tqdm
from urllib3.exceptions import HTTPError, IncompleteRead
from urllib3.util import Retry

CHUNK = 1 << 16  # bytes read at once, and lost at most when a connection breaks
ATTEMPTS = 5  # in a row that bring no byte
PAUSE = 1.0  # seconds before the first repeated request, doubled each time
TIMEOUT = (15, 60)  # seconds to connect, and between two packets
CUT = (requests.ConnectionError, requests.Timeout, requests.exceptions.ChunkedEncodingError, HTTPError)


class DownloadError(Exception):
    """What failed and what to do about it, in one message for the user."""


class Unavailable(DownloadError):
    """This address cannot serve the file; another one may."""


@dataclass(frozen=True)
class Address:
    """An address with what is known of the file there: its size in bytes and its sums (hexadecimal)."""

    url: str
    bytes: int | None = None
    sha256: str | None = None
    md5: str | None = None


def open_session() -> requests.Session:
    """A session that asks busy servers (429, 5xx) again, when they say or after a while."""
    retry = Retry(
        status=3,
        connect=0,  # broken connections are `download`'s
        read=0,
        backoff_factor=PAUSE,
        status_forcelist=(429, 500, 502, 503, 504),
        allowed_methods={"GET"},
        raise_on_status=False,
    )
    session = requests.Session()
    session.headers["User-Agent"] = "self1e-data-get"
    for scheme in "http://", "https://":
        session.mount(scheme, HTTPAdapter(max_retries=retry))
    return session


def part_path(address: Address, target: Path) -> Path:
    """Where the bytes that have arrived from an address are kept."""
    return target.with_name(f".{target.name}.{hashlib.sha256(address.url.encode()).hexdigest()[:8]}.part")


def size(path: Path) -> int:
    """Bytes of a file, 0 where there is none."""
    return path.stat().st_size if path.exists() else 0


def require_space(folder: Path, needed: int, purpose: str) -> None:
    """Raises DownloadError where the disk of `folder`, which need not exist yet, has less than `needed` bytes free."""
    existing = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    free = shutil.disk_usage(existing).free
    if needed > free:
        raise DownloadError(
            f"{purpose} needs {human(needed)} and the disk of {existing} has {human(free)} free; "
            "make room, or choose another disk with --to, --data_dir or --downloads"
        )


def human(count: float) -> str:
    """1536 -> "1.5 KB", in powers of 1024."""
    for unit in ("B", "KB", "MB", "GB"):
        if count < 1024:
            return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TB"


def download(
    address: Address,
    target: Path,
    *,
    session: requests.Session,
    check: Callable[[Path], None] = lambda path: None,
    accept_changed: bool = False,
) -> None:
    """Bring the file at `address` to `target`, which must not exist; asks again after a cut.

    check:          raises ValueError where the downloaded file is not what its name says
    accept_changed: take a file of another size or sum than the known one
    Raises Unavailable where the address does not serve the file, or another one, and DownloadError where the same
    command can continue later or the disk is too small.
    """
    part = part_path(address, target)
    part.parent.mkdir(parents=True, exist_ok=True)
    known = address.bytes if not accept_changed else None
    first, stalled = size(part), 0
    while size(part) != known:
        before = size(part)
        try:
            if receive(address, part, session, known):
                break
            problem = "it did not continue where the download stopped"
        except CUT as error:
            problem = plain(error)
        except requests.RequestException as error:
            raise Unavailable(f"{address.url}: {plain(error)}") from error
        stalled = 0 if size(part) > before else stalled + 1
        if stalled == ATTEMPTS:
            message = f"{address.url}: {problem} ({ATTEMPTS} attempts)"
            if size(part) > first:  # this address works, and the rest may come later
                raise DownloadError(f"{message}; {human(size(part))} are kept, run the same command again to continue")
            raise Unavailable(message)
        wait = PAUSE * 2**stalled
        tqdm.write(f"{address.url}: {problem}; asking again in {wait:.0f} s", file=sys.stderr)
        time.sleep(wait)
    try:
        check(part)
    except ValueError as error:
        part.unlink()
        raise Unavailable(f"{address.url}: {error}; it was deleted") from error
    if not accept_changed:
        try:
            check_sums(address, part)
        except ValueError as error:
            raise Unavailable(
                f"{address.url}: {error}; delete {part} to download it afresh, or take it with --accept_changed"
            ) from error
    part.rename(target)
    note_path(part).unlink(missing_ok=True)


def receive(address: Address, part: Path, session: requests.Session, known: int | None) -> bool:
    """One request that appends to `part`; whether the file is whole. False: start again, nothing is left of it.

    Raises one of `CUT` when the connection breaks, Unavailable for an answer that is not the file or is announced with
    another size than the known one, and DownloadError when the disk is too small.
    """
    have = size(part)
    headers = {"Accept-Encoding": "identity"}
    if have:
        headers |= {"Range": f"bytes={have}-"} | read_note(part)
    with session.get(address.url, headers=headers, stream=True, timeout=TIMEOUT) as response:
        if response.status_code == 416 and have:  # nothing lies behind what has arrived
            if response.headers.get("Content-Range", "").endswith(f"/{have}"):
                return True
            part.unlink()
            return False
        refuse(address, response)
        start, total = extent(response)
        if start not in (0, have):
            part.unlink()
            return False
        if known is not None and total not in (None, known):
            raise Unavailable(
                f"{address.url} announces {total:,} bytes where {known:,} are expected: it is another version, or not "
                "the file; take it as it is with --accept_changed"
            )
        require_space(part.parent, (total or 0) - start, address.url)
        if start == 0:
            write_note(part, response)
        with (
            open(part, "ab" if start else "wb") as file,
            tqdm(total=total, initial=start, desc=part.name[1:-14][:40], unit="B", unit_scale=True) as bar,
        ):
            for chunk in response.iter_content(CHUNK):
                file.write(chunk)
                bar.update(len(chunk))
    return total is None or size(part) == total


def refuse(address: Address, response: requests.Response) -> None:
    """Raises Unavailable for an answer that is not the file."""
    if response.status_code not in (200, 206):
        raise Unavailable(f"{address.url} answers {response.status_code} {response.reason}")
    if response.headers.get("Content-Type", "").startswith("text/html"):
        raise Unavailable(
            f"{address.url} answers with a web page instead of the file: it has moved or asks for a click"
        )


def extent(response: requests.Response) -> tuple[int, int | None]:
    """(first byte, size of the whole file or None) of an answer; (-1, None) for a part that cannot be used."""
    encoded = response.headers.get("Content-Encoding", "identity") != "identity"  # although nobody asked for it
    if response.status_code == 206:
        found = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", response.headers.get("Content-Range", ""))
        if found is None or encoded:
            return -1, None
        return int(found[1]), None if found[2] == "*" else int(found[2])
    length = response.headers.get("Content-Length", "")
    return 0, int(length) if length.isdigit() and not encoded else None


def check_sums(address: Address, path: Path) -> None:
    """Raises ValueError where size or sums are not the known ones."""
    if address.bytes is not None and size(path) != address.bytes:
        raise ValueError(f"it has {size(path):,} bytes where {address.bytes:,} are expected")
    for name, expected in (("sha256", address.sha256), ("md5", address.md5)):
        if expected is None:
            continue
        digest = hashlib.new(name, usedforsecurity=False)
        with open(path, "rb") as file, tqdm(total=size(path), desc=f"{name}", unit="B", unit_scale=True) as bar:
            while chunk := file.read(CHUNK):
                digest.update(chunk)
                bar.update(len(chunk))
        if digest.hexdigest() != expected:
            raise ValueError(f"its {name} is {digest.hexdigest()}, expected {expected}: it changed or was damaged")


def note_path(part: Path) -> Path:
    return part.with_suffix(".json")


def write_note(part: Path, response: requests.Response) -> None:
    """Remember which version of the file is being downloaded, where the server says so."""
    tag = response.headers.get("ETag", "W/")
    version = response.headers.get("Last-Modified") if tag.startswith("W/") else tag
    note_path(part).write_text(json.dumps({"If-Range": version} if version else {}), encoding="utf-8")


def read_note(part: Path) -> dict[str, str]:
    """The header that makes the server start again when the file is another one than before."""
    try:
        return json.loads(note_path(part).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def plain(error: BaseException) -> str:
    """The innermost reason of a failed request, without the names of library objects."""
    while inner := [each for each in (*error.args, getattr(error, "reason", None)) if isinstance(each, Exception)]:
        error = inner[-1]
    if isinstance(error, IncompleteRead):
        return "the connection broke"
    return str(error).split(": ", 1)[-1] or type(error).__name__
