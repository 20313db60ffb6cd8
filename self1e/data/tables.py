"""Records of large annotation files, parsed once and memory-mapped by every rank and worker.

Each file is read once, by one of `readers`, into a folder of the cache (env SELF1E_CACHE, else ~/.cache/self1e):
`texts` holds one JSON text after another, and `<table>.npy` where the records of a table begin and end in it, and the
keys of each. The folder's name holds a hash of the source's path, size and modification time and of VERSION.
"""

import hashlib
import json
import logging
import os
from array import array
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock

from self1e.errors import UserError
from self1e.files import check_fetched, replacing

log = logging.getLogger(__name__)
VERSION = 11  # of what the readers write
Records = Iterable[tuple[str, Any, *tuple[int, ...]]]  # of a reader: table, what JSON can hold, integer keys


class Table(Sequence[Any]):
    """Read-only list of JSON records, memory-mapped; pickles as the names of its files."""

    def __init__(self, folder: Path, name: str):
        self.folder, self.name = folder, name
        numbers = np.load(folder / f"{name}.npy", mmap_mode="r")
        self._bounds, self.keys = numbers[:, :2], numbers[:, 2:]  # int64 (records, 2), (records, keys of each)
        self._texts = np.memmap(folder / "texts", mode="r")

    def __reduce__(self):
        return Table, (self.folder, self.name)

    def __len__(self) -> int:
        return len(self._bounds)

    def __getitem__(self, i: int) -> Any:  # type: ignore[override]  # records are never sliced
        begin, end = self._bounds[i]
        return json.loads(self._texts[begin:end].tobytes())

    def having(self, key: int, column: int = 0) -> list[Any]:
        """The records with a key, in their order."""
        return [self[int(i)] for i in np.flatnonzero(self.keys[:, column] == key)]


def open_tables(source: Path, read: Callable[[Path], Records]) -> dict[str, Any]:
    """The tables of `source`, built by `read` (one of `readers`) unless the cache holds them.

    One process of a machine builds, the others wait for it; a folder appears under its final name only when complete.
    Raises UserError when the source is corrupt or of another schema, or the cache cannot be written.
    """
    stat = source.stat()
    key = [str(source.resolve()), stat.st_size, stat.st_mtime_ns, read.__name__, VERSION]
    name = f"{source.stem}-{hashlib.sha256(json.dumps(key).encode()).hexdigest()[:16]}"
    cache = Path(os.environ.get("SELF1E_CACHE") or Path.home() / ".cache" / "self1e")
    folder = cache / name
    if not folder.is_dir():
        if stat.st_size > 50e6:
            log.info("reading %s (%.1f GB), once for all runs", source, stat.st_size / 1e9)
        try:
            cache.mkdir(parents=True, exist_ok=True)
            with FileLock(cache / f"{name}.lock"):
                if not folder.is_dir():
                    with replacing(folder, folder=True) as partial:
                        _write(read(source), partial)
        except UserError as error:
            check_fetched(source)
            raise UserError(f"{source}: {error}") from error
        except OSError as error:
            advice = "set SELF1E_CACHE to a folder with room for about the size of the annotation files"
            raise UserError(f"cannot write the tables of {source} to {cache} ({error}); {advice}") from error
    return defaultdict(list, {path.stem: Table(folder, path.stem) for path in folder.glob("*.npy")})


def _write(records: Records, folder: Path) -> None:
    numbers: dict[str, array] = defaultdict(lambda: array("q"))
    widths, end = {}, 0
    with open(folder / "texts", "wb") as texts:
        for table, record, *keys in records:
            begin, end = end, end + texts.write(json.dumps(record, separators=(",", ":")).encode())
            numbers[table].extend((begin, end, *keys))
            widths[table] = 2 + len(keys)
    for table, width in widths.items():
        columns = np.asfortranarray(np.array(numbers[table]).reshape(-1, width))  # so that `having` reads one of them
        np.save(folder / f"{table}.npy", columns)
