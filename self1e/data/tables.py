"""Compact indexes of the large annotation files, parsed once, memory-mapped by every rank and worker.

PACO's, COCO's and the question files are hundreds of MB of JSON. Each is read once, element by element, by one of
`readers`, into a folder of the cache (env SELF1E_CACHE, else ~/.cache/self1e): per table `<table>.bin` with one JSON
text after another and `<table>.offsets.npy`, plus integer arrays to look records up, and `meta.json`, which also holds
the source's SHA-256. No pickle. The folder's name holds a hash of the source's path, size and modification time and of
READER_VERSION. What it costs is in docs/data.md.
"""

import contextlib
import hashlib
import json
import mmap
import os
import shutil
import tempfile
from array import array
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from filelock import FileLock
from tqdm import tqdm

from self1e.files import digest, sync_folder

READER_VERSION = 3


class Records(Sequence[Any]):
    """Read-only list of JSON records; pickles as its path, opens its maps on first use."""

    def __init__(self, stem: Path):
        self.stem = stem
        self._opened: tuple[np.ndarray, mmap.mmap | bytes] | None = None

    def __reduce__(self):
        return Records, (self.stem,)

    def _open(self) -> tuple[np.ndarray, mmap.mmap | bytes]:
        """(offsets, texts)"""
        if self._opened is None:
            offsets = np.load(f"{self.stem}.offsets.npy", mmap_mode="r")
            with open(f"{self.stem}.bin", "rb") as file:
                # An empty file cannot be mapped.
                texts = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if offsets[-1] else b""
            self._opened = offsets, texts
        return self._opened

    def __len__(self) -> int:
        return len(self._open()[0]) - 1

    def __getitem__(self, i: int) -> Any:  # type: ignore[override]  # records are never sliced
        if not 0 <= i < len(self):
            raise IndexError(i)
        offsets, texts = self._open()
        return json.loads(texts[offsets[i] : offsets[i + 1]])


class Index:
    """One indexed file: `index.table(name)`, `index.array(name)`, `index.meta`."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.meta: dict[str, Any] = json.loads((folder / "meta.json").read_text())
        self._arrays: dict[str, np.ndarray] = {}

    def __reduce__(self):
        return Index, (self.folder,)

    @property
    def sha256(self) -> str:
        """The SHA-256 of the source when it was read."""
        return self.meta["sha256"]

    def table(self, name: str) -> Records:
        return Records(self.folder / name)

    def array(self, name: str) -> np.ndarray:
        if name not in self._arrays:
            self._arrays[name] = np.load(self.folder / f"{name}.npy", mmap_mode="r")
        return self._arrays[name]


class Writer:
    """Collects tables, arrays and meta data of one index in `folder`."""

    def __init__(self, folder: Path, title: str = ""):
        self.folder = folder
        self.meta: dict[str, Any] = {}
        self._bar = tqdm(desc=title, unit="B", unit_scale=True, delay=2, leave=False)
        self._tables: dict[str, tuple[BinaryIO, array[int]]] = {}

    def declare(self, *tables: str) -> None:
        for table in tables:
            self._tables[table] = open(self.folder / f"{table}.bin", "wb"), array("q", [0])

    def add(self, table: str, record: Any) -> None:
        self.add_text(table, json.dumps(record, ensure_ascii=False, separators=(",", ":")))

    def add_text(self, table: str, record: str) -> None:
        """A record that is JSON already."""
        file, offsets = self._tables[table]
        offsets.append(offsets[-1] + file.write(record.encode()))

    def progress(self, done: int, total: int) -> None:
        """Show a bar once reading takes more than a moment; `done` of `total` characters of the source."""
        self._bar.total = total
        self._bar.update(done - self._bar.n)

    def array(self, name: str, values: Any) -> None:
        np.save(self.folder / f"{name}.npy", np.asarray(values, np.int64))

    def close(self, complete: bool) -> None:
        self._bar.close()
        for name, (file, offsets) in self._tables.items():
            file.close()
            if complete:
                np.save(self.folder / f"{name}.offsets.npy", np.frombuffer(offsets, np.int64))
        if complete:
            (self.folder / "meta.json").write_text(json.dumps(self.meta))


def open_index(source: Path, read: Callable[[Path, Writer], None]) -> Index:
    """The index of `source`, built by `read` (one of `readers`) unless the cache holds it.

    One process of a machine builds, the others wait for it; a folder appears under its final name only when complete.
    Raises FileNotFoundError without the source, ValueError when it is corrupt or of another schema, and OSError that
    names SELF1E_CACHE when the cache cannot be written.
    """
    stat = source.stat()
    key = [str(source.resolve()), stat.st_size, stat.st_mtime_ns, read.__name__, READER_VERSION]
    name = f"{source.stem}-{hashlib.sha256(json.dumps(key).encode()).hexdigest()[:16]}"
    cache = Path(os.environ.get("SELF1E_CACHE") or Path.home() / ".cache" / "self1e")
    final = cache / name
    if final.is_dir():
        return Index(final)
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with FileLock(cache / f"{name}.lock"):
            if not final.is_dir():
                _build(source, read, final)
    except OSError as error:
        raise OSError(
            f"cannot write the index of {source} to {cache} ({error}); "
            "set SELF1E_CACHE to a folder with room for about the size of the annotation files"
        ) from error
    return Index(final)


def _build(source: Path, read: Callable[[Path, Writer], None], final: Path) -> None:
    folder = Path(tempfile.mkdtemp(prefix=f"{final.name}.", dir=final.parent))
    writer = Writer(folder, f"index of {source.name}")
    try:
        try:
            read(source, writer)
        except BaseException as error:
            with contextlib.suppress(OSError):  # buffers that no longer fit the disk; the cause is on its way up
                writer.close(complete=False)
            if isinstance(error, UnicodeEncodeError):  # JSON can spell half a character
                raise ValueError(f"{source} holds text that is no Unicode ({error}); download it again") from error
            raise
        writer.meta["sha256"] = digest(source)["sha256"]
        writer.close(complete=True)
        folder.chmod(0o755)  # a cache may be shared among users
        sync_folder(folder)
        try:
            os.rename(folder, final)
        except OSError:  # some file systems say ENOTEMPTY, others EEXIST
            if not final.is_dir():  # unless another machine that shares the cache was first
                raise
    finally:
        shutil.rmtree(folder, ignore_errors=True)
