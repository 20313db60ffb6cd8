"""Which files the selected data needs, which are absent, and which names annotation files may use."""

import os
import unicodedata
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path, PureWindowsPath

from self1e.errors import UserError

DATASETS, OWN_DATA = "docs/data.md, section Datasets", "docs/data.md, section Own data"


def missing(wanted: Iterable[tuple[str, Path]]) -> list[tuple[str, Path]]:
    """Those (set or split, path) pairs whose path is not on disk."""
    return [(name, path) for name, path in wanted if not path.exists()]


def require_paths(wanted: Iterable[tuple[str, Path]]) -> None:
    """Raise one UserError that names every path of the (set or split, path) pairs that is not on disk."""
    users: dict[Path, dict[str, None]] = defaultdict(dict)  # missing path -> sets, each once
    for name, path in missing(wanted):
        users[path][name] = None
    if users:
        where = f"missing data; {DATASETS}, says what goes where, and scripts/get_data.sh fetches sets:"
        lines = [f"{path}   ({', '.join(names)})" for path, names in users.items()]
        raise UserError("\n  ".join([where, *lines]))


def list_names(folder: Path, suffix: str) -> list[str]:
    """Sorted names of the files of a folder that end with `suffix`, without hidden ones such as a Mac's `._x.jpg`."""
    return sorted(path.name for path in folder.glob(f"[!.]*{suffix}"))


def inside(folder: Path, name: str, *, allow_outside: bool = False) -> Path:
    """The path of a file that an annotation file names relative to `folder`.

    Annotation files come from strangers, so a name may not lead out of the folder: it is relative and has no `..`.
    Raises UserError for all else, unless `allow_outside`. Links are followed, because users link photos into the tree.
    A name with accents is found in either of its Unicode forms.
    """
    windows = PureWindowsPath(name)
    if not allow_outside and (name.startswith("/") or windows.drive or ".." in windows.parts or "\0" in name):
        raise UserError(f"{name!r:.200} leads out of {folder}; if that is meant, add --allow_outside")
    if max(map(len, name.encode(errors="replace").split(b"/"))) > 255:
        raise UserError(f"{name!r:.200} is no file's name: it has more than 255 bytes")
    path = folder / name
    if not name.isascii() and not path.exists():
        forms = (unicodedata.normalize(form, name).encode(errors="replace") for form in ("NFC", "NFD"))
        path = next((place for form in forms if (place := folder / os.fsdecode(form)).exists()), path)
    if "\\" in name and not path.exists():
        raise UserError(f"{name!r:.200} has backslashes, which separate folders on Windows alone; write slashes")
    return path
