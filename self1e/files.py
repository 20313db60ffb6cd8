"""Files and folders that appear complete or not at all, also when the disk fills or the power goes."""

import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from self1e.errors import UserError

T = TypeVar("T")


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary file beside `path` that takes its place when the block ends without an error, else is removed.

    Missing folders are made.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield temporary
        _sync(temporary)
        temporary.replace(path)
        _sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def replacing_folder(path: Path) -> Iterator[Path]:
    """As `replacing`, an empty folder."""
    partial, previous = (path.with_name(f".{path.name}.{word}") for word in ("partial", "previous"))
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        yield partial
        sync_folder(partial)
        if path.exists():
            shutil.rmtree(previous, ignore_errors=True)
            path.rename(previous)
        partial.rename(path)
        _sync(path.parent)
        shutil.rmtree(previous, ignore_errors=True)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def sync_folder(folder: Path) -> None:
    """Put a folder and everything in it on the disk, so that a rename that follows cannot outrun the contents."""
    for place in [*folder.rglob("*"), folder]:
        _sync(place)


def _sync(path: Path) -> None:
    if os.name == "nt" and path.is_dir():  # which opens no folders
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
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


def read_json(path: Path, kind: type[T]) -> T:
    """The value of a small JSON file. Raises UserError when it cannot be read or is no `kind`."""
    try:
        value = json.loads(path.read_text(encoding="utf-8-sig"))
        if not isinstance(value, kind):
            raise ValueError(f"it holds a {type(value).__name__}; expected a {kind.__name__}")
    except (OSError, ValueError, RecursionError) as error:
        if path.is_file():
            check_fetched(path)
        raise UserError(f"{path} cannot be read ({error})") from error
    return value


def check_fetched(path: Path) -> None:
    """Raise UserError for a file that is a pointer of Git LFS."""
    with open(path, "rb") as file:
        if file.read(24) == b"version https://git-lfs.":
            raise UserError(f"{path} is a Git LFS pointer: fetch the file itself with `git lfs pull`")


def check_utf8(folder: str | Path) -> None:
    """Raise UserError for a name that is not UTF-8: the libraries of weights, tokens and curves take no other."""
    if str(folder) != str(folder).encode(errors="ignore").decode():
        raise UserError(f"{folder}: the name is not UTF-8; rename the folder")


def check_writable(folder: Path) -> None:
    """Try whether a folder can be made and written in, before the work whose results go there; else UserError.

    What is missing of it is made in a temporary folder: other processes may be making the folder at this moment.
    """
    existing = next(place for place in (folder, *folder.parents) if os.path.lexists(place))
    try:
        with tempfile.TemporaryDirectory(prefix=".writable.", dir=existing) as probe:
            Path(probe, folder.relative_to(existing), "made").mkdir(parents=True)
    except OSError as error:
        raise UserError(f"{folder}: cannot be written to ({error.strerror}); choose another folder") from error
