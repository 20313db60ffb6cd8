"""Files and folders that appear complete or not at all, also when the disk fills or the power goes."""

import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, TypeVar

from filelock import FileLock, Timeout

from self1e.errors import UserError

T = TypeVar("T")


@contextmanager
def replacing(path: Path, *, folder: bool = False) -> Iterator[Path]:
    """A new file, or an empty folder, that takes the place of `path` when the block ends without an error.

    Until then it lies beside `path` under a hidden name. Missing folders are made.
    """
    own = "partial" if folder else f"partial{os.getpid()}"  # several evaluations may write one summary together
    partial, previous = (path.with_name(f".{path.name}.{word}") for word in (own, "previous"))
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        _remove(partial)
        if folder:
            partial.mkdir()
        yield partial
        sync(partial)
        if folder and path.exists():
            _remove(previous)
            path.rename(previous)
        partial.replace(path)
        _remove(previous)
    finally:
        _remove(partial)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Put a file, or a folder and all in it, on the disk, so that a rename that follows cannot outrun the contents."""
    for one in [*path.rglob("*"), path]:
        if os.name != "nt" or one.is_file():  # Windows opens no folders
            descriptor = os.open(one, os.O_RDONLY)
            os.fsync(descriptor)
            os.close(descriptor)


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 file; bytes of a file name that are no UTF-8 are escaped, as JSON does it."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")


def write_json(path: Path, value: Any, *, indent: int | None = 1) -> None:
    """Write a JSON file, UTF-8 and not escaped."""
    write_text(path, json.dumps(value, ensure_ascii=False, indent=indent) + "\n")


def to_jsonl(records: Iterable[dict]) -> str:
    """One JSON object per line, not escaped but for bytes of a file name that are no UTF-8."""
    text = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    return text.encode(errors="backslashreplace").decode()


def read_records(path: Path) -> Iterator[dict]:
    """The lines of a JSONL of ours, none where it is absent, without a last one that was torn when its run ended."""
    if path.exists():
        with open(path, "rb") as file:
            yield from (json.loads(line) for line in file if line.endswith(b"\n"))


def read_json(path: Path, kind: type[T], other: str = "utf-8") -> T:
    """The value of a small JSON file, UTF-8 or else of encoding `other`. Raises UserError unless it is a `kind`."""
    try:
        raw = path.read_bytes()
        try:
            value = json.loads(raw)  # with or without BOM
        except UnicodeDecodeError:
            value = json.loads(raw.decode(other))
        if not isinstance(value, kind):
            raise ValueError(f"it holds a {type(value).__name__}; expected a {kind.__name__}")
    except (OSError, ValueError, RecursionError) as error:
        check_fetched(path)
        raise UserError(f"{path} cannot be read ({error})") from error
    return value


def check_fetched(path: Path) -> None:
    """Raise UserError for a file that is absent or a pointer of Git LFS."""
    if not path.is_file():
        raise UserError(f"{path} is missing")
    with open(path, "rb") as file:
        if file.read(24) == b"version https://git-lfs.":
            raise UserError(f"{path} is a Git LFS pointer: fetch the file itself with `git lfs pull`")


def check_utf8(folder: str | Path) -> None:
    """Raise UserError for a name that is not UTF-8: the libraries of weights, tokens and curves take no other."""
    if str(folder) != str(folder).encode(errors="ignore").decode():
        raise UserError(f"{folder}: the name is not UTF-8; rename the folder")


def check_writable(folder: Path) -> None:
    """Make a folder and try to write in it, before the work whose results go there; else UserError."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise UserError(f"{folder}: cannot be written to ({error.strerror}); choose another folder") from error


def alone_in(folder: Path, *, patience: float = 10) -> AbstractContextManager:
    """Keep a second run out of a folder, where each would delete what the other writes. For the first rank.

    patience: seconds in which the data workers of a killed run end, and with them its hold on the folder.
    """
    lock = folder / ".lock"
    try:
        return FileLock(lock).acquire(timeout=patience)
    except Timeout:
        raise UserError(
            f"{folder}: another run is at work in this folder; wait for its end, or give another --exp_name or "
            f"--output. If its machine went down, remove {lock}"
        ) from None
