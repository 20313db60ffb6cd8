"""Which files and folders the selected data needs, and which of them are absent."""

from collections.abc import Iterable
from pathlib import Path

README = "docs/data.md, section Datasets"


def missing(wanted: Iterable[tuple[str, Path]]) -> list[tuple[str, Path]]:
    """Those (set or split, path) pairs whose path is not on disk."""
    return [(name, path) for name, path in wanted if not path.exists()]


def require_paths(wanted: Iterable[tuple[str, Path]]) -> None:
    """Raise one FileNotFoundError that names every path of the (set or split, path) pairs that is not on disk."""
    users: dict[Path, list[str]] = {}
    for name, path in missing(wanted):
        if name not in users.setdefault(path, []):
            users[path].append(name)
    if users:
        lines = "\n".join(f"  {path}   ({', '.join(names)})" for path, names in users.items())
        raise FileNotFoundError(f"missing data; {README}, says what goes where:\n{lines}")
