"""Which files the selected data needs, which are absent, and which names annotation files may use."""

import os
import unicodedata
from collections.abc import Iterable
from pathlib import Path, PurePosixPath, PureWindowsPath

from self1e.errors import UserError

DATASETS, OWN_DATA = "docs/data.md, section Datasets", "docs/data.md, section Own data"
LINKED_LEVELS = 2  # folders below a photo folder that may be links to anywhere


def missing(wanted: Iterable[tuple[str, Path]]) -> list[tuple[str, Path]]:
    """Those (set or split, path) pairs whose path is not on disk."""
    return [(name, path) for name, path in wanted if not path.exists()]


def require_paths(wanted: Iterable[tuple[str, Path]]) -> None:
    """Raise one UserError that names every path of the (set or split, path) pairs that is not on disk.

    All of them below one folder that is missing itself, such as a mistyped `--dataset_dir`, are one line.
    """
    users: dict[Path, dict[Path, list[str]]] = {}  # missing folder or file -> paths in it -> sets
    for name, path in missing(wanted):
        top = next(place for place in (*reversed(path.parents), path) if not place.exists())
        users.setdefault(top, {}).setdefault(path, []).append(name)
    if not users:
        return
    lines = [
        f"{top}   (missing, with {len(paths)} files and folders)"
        if len(paths) > 3
        else "\n  ".join(f"{path}   ({', '.join(dict.fromkeys(names))})" for path, names in paths.items())
        for top, paths in users.items()
    ]
    where = f"missing data; {DATASETS}, says what goes where, and scripts/get_data.sh fetches sets"
    raise UserError("\n  ".join([f"{where}:", *lines]))


def list_names(folder: Path, suffix: str) -> list[str]:
    """Sorted names of the files of a folder that end with `suffix`, such as ".jpg"; hidden ones are left out.

    Hidden are names that begin with a dot, such as the `._x.jpg` that a Mac puts beside x.jpg.
    """
    with os.scandir(folder) as entries:
        return sorted(entry.name for entry in entries if entry.name.endswith(suffix) and entry.name[0] != ".")


def inside(folder: Path, name: str, *, allow_outside: bool = False) -> Path:
    """The path of a file that an annotation file names relative to `folder`.

    Annotation files come from strangers, so a name may not lead out of the folder: it is relative and has no `..`. The
    folder itself and the folders in its first two levels may be links to anywhere, because users link whole folders of
    photos into the tree; a file that is a link, or a link deeper down, must stay in that folder. Raises UserError for
    all else, unless `allow_outside`. A name with accents is found in either of its Unicode forms.
    """
    pure = PurePosixPath(name)
    if not allow_outside and (
        pure.is_absolute() or PureWindowsPath(name).drive or ".." in PureWindowsPath(name).parts or "\0" in name
    ):
        raise UserError(f"{name!r:.200} leads out of {folder}; if that is meant, add --allow_outside")
    path = folder / name
    if not name.isascii() and not path.exists():
        forms = (folder / unicodedata.normalize(form, name) for form in ("NFC", "NFD"))
        path = next((form for form in forms if form.exists()), path)
    if "\\" in name and not path.exists():
        raise UserError(f"{name!r:.200} has backslashes, which separate folders on Windows alone; write slashes")
    if not allow_outside and (os.path.islink(path) or len(pure.parts) > LINKED_LEVELS + 1):
        anchor = Path(os.path.realpath(folder.joinpath(*pure.parts[:-1][:LINKED_LEVELS])))
        target = Path(os.path.realpath(path))
        if not target.is_relative_to(anchor):
            raise UserError(f"{path} is a link to {target}, outside {anchor}; if that is meant, add --allow_outside")
    return path
