"""Which files and folders the selected data needs, which are absent, and which no annotation file may name."""

import os
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path, PurePosixPath, PureWindowsPath

DATASETS = "docs/data.md, section Datasets"
LINKED_LEVELS = 2  # folders below a photo folder that may be links to anywhere


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
        raise FileNotFoundError(
            f"missing data; {DATASETS}, says what goes where, and `self1e data get` brings most sets:\n{lines}"
        )


def inside(folder: Path, name: str, *, allow_outside: bool = False) -> Path:
    """The path of a file that an annotation file names relative to `folder`.

    Annotation files come from strangers, so a name may not lead out of the folder: it is relative and has no `..`. The
    folder itself and the folders in its first two levels may be links to anywhere, because users link whole folders of
    photos into the tree; a file that is a link, or a link deeper down, must stay in that folder. Raises ValueError for
    all else, unless `allow_outside`.
    """
    path = folder / name
    if allow_outside:
        return path
    pure = PurePosixPath(name)
    if pure.is_absolute() or PureWindowsPath(name).drive or ".." in PureWindowsPath(name).parts or "\0" in name:
        raise ValueError(f"{name!r:.200} leads out of {folder}; if that is meant, add --allow_outside")
    if os.path.islink(path) or len(pure.parts) > LINKED_LEVELS + 1:
        anchor = _resolved(folder.joinpath(*pure.parts[:-1][:LINKED_LEVELS]))
        target = Path(os.path.realpath(path))
        if not target.is_relative_to(anchor):
            raise ValueError(f"{path} is a link to {target}, outside {anchor}; if that is meant, add --allow_outside")
    return path


@lru_cache(maxsize=4096)
def _resolved(folder: Path) -> Path:
    return Path(os.path.realpath(folder))
