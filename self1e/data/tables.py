"""Records of large annotation files, parsed once and memory-mapped by every rank and worker.

Each file is read once, by one of `readers`, into a folder of the cache (env SELF1E_CACHE, else ~/.cache/self1e): per
table `<table>.bin` with one JSON text after another and `<table>.offsets.npy`, plus integer arrays to look records up,
and `meta.json`. The folder's name holds a hash of the source's path, size and modification time and of VERSION.
"""

import hashlib
import json
import logging
import os
from array import array
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from filelock import FileLock

from self1e.errors import UserError
from self1e.files import check_fetched, replacing_folder

log = logging.getLogger(__name__)
VERSION = 6  # of what the readers write


class Records(Sequence[Any]):
    """Read-only list of JSON records, memory-mapped; pickles as its path."""

    def __init__(self, stem: Path):
        self.stem = stem
        self._offsets = np.load(f"{stem}.offsets.npy", mmap_mode="r")
        self._texts = np.memmap(f"{stem}.bin", mode="r")

    def __reduce__(self):
        return Records, (self.stem,)

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def __getitem__(self, i: int) -> Any:  # type: ignore[override]  # records are never sliced
        if not 0 <= i < len(self):
            raise IndexError(i)
        return json.loads(self._texts[self._offsets[i] : self._offsets[i + 1]].tobytes())


class Tables:
    """What a reader made of one file: `records(table)`, `array(name)`, `meta`."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.meta: dict[str, Any] = json.loads((folder / "meta.json").read_text(encoding="utf-8"))

    def records(self, table: str) -> Sequence[Any]:
        return Records(self.folder / table) if (self.folder / f"{table}.bin").exists() else []

    def array(self, name: str) -> np.ndarray:
        """int64, memory-mapped."""
        return np.load(self.folder / f"{name}.npy", mmap_mode="r")


class Writer:
    """What a reader writes to: records of tables, integer arrays, and `meta`."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.meta: dict[str, Any] = {}
        self._tables: dict[str, tuple[BinaryIO, array[int]]] = {}

    def add(self, table: str, record: Any) -> int:
        """Append a record and return its number."""
        if table not in self._tables:
            self._tables[table] = open(self.folder / f"{table}.bin", "wb"), array("q", [0])
        file, offsets = self._tables[table]
        offsets.append(offsets[-1] + file.write(json.dumps(record, separators=(",", ":")).encode()))
        return len(offsets) - 2

    def array(self, name: str, values: Any) -> None:
        np.save(self.folder / f"{name}.npy", np.asarray(values, np.int64))

    def close(self) -> None:
        for name, (file, offsets) in self._tables.items():
            file.close()
            self.array(f"{name}.offsets", offsets)
        (self.folder / "meta.json").write_text(json.dumps(self.meta), encoding="utf-8")


def open_tables(source: Path, read: Callable[[Path, Writer], None]) -> Tables:
    """The tables of `source`, built by `read` (one of `readers`) unless the cache holds them.

    One process of a machine builds, the others wait for it; a folder appears under its final name only when complete.
    Raises UserError when the source is corrupt or of another schema, or the cache cannot be written.
    """
    stat = source.stat()
    key = [str(source.resolve()), stat.st_size, stat.st_mtime_ns, read.__name__, VERSION]
    name = f"{source.stem}-{hashlib.sha256(json.dumps(key).encode()).hexdigest()[:16]}"
    cache = Path(os.environ.get("SELF1E_CACHE") or Path.home() / ".cache" / "self1e")
    folder = cache / name
    if folder.is_dir():
        return Tables(folder)
    if stat.st_size > 50e6:
        log.info("reading %s (%.1f GB), once for all runs", source, stat.st_size / 1e9)
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with FileLock(cache / f"{name}.lock"):
            if not folder.is_dir():
                with replacing_folder(folder) as partial:
                    writer = Writer(partial)
                    read(source, writer)
                    writer.close()
    except UserError as error:
        check_fetched(source)
        raise UserError(f"{source}: {error}") from error
    except OSError as error:
        advice = "set SELF1E_CACHE to a folder with room for about the size of the annotation files"
        raise UserError(f"cannot write the tables of {source} to {cache} ({error}); {advice}") from error
    return Tables(folder)
