"""Which files and folders the selected data needs, which are absent, and which no annotation file may name."""

import os
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path, PurePosixPath, PureWindowsPath

from self1e.flags import did_you_mean

DATASETS, OWN_DATA = "docs/data.md, section Datasets", "docs/data.md, section Own data"
# Sets that scripts/get_data.sh does not bring: a user's own, and those that only their authors hand out.
UNFETCHED = ("custom", "parquet", "refcocom", "refzom", "rrefcoco", "rrefcoco+", "rrefcocog")
FEW = 3  # missing paths of one missing folder that are named one by one
LINKED_LEVELS = 2  # folders below a photo folder that may be links to anywhere


def missing(wanted: Iterable[tuple[str, Path]]) -> list[tuple[str, Path]]:
    """Those (set or split, path) pairs whose path is not on disk."""
    return [(name, path) for name, path in wanted if not path.exists()]


def require_paths(wanted: Iterable[tuple[str, Path]]) -> None:
    """Raise one FileNotFoundError that names every path of the (set or split, path) pairs that is not on disk.

    Several of them below one folder that is missing itself, such as a mistyped `--dataset_dir`, are one line.
    """
    users: dict[Path, list[str]] = {}
    for name, path in missing(wanted):
        if name not in users.setdefault(path, []):
            users[path].append(name)
    if not users:
        return
    below: dict[Path, list[Path]] = {}
    for path in users:
        below.setdefault(_first_missing(path), []).append(path)
    lines = []
    for folder, paths in below.items():
        if len(paths) > FEW:
            sets = {name for path in paths for name in users[path]}
            lines.append(f"{folder}   (the folder is missing: {len(paths)} files and folders of {len(sets)} sets)")
        else:
            lines += [f"{path}   ({', '.join(users[path])}{_near(path, users[path])})" for path in paths]
    wanted_sets = dict.fromkeys(name.split("|")[0] for names in users.values() for name in names)
    where = OWN_DATA if wanted_sets.keys() <= {"custom"} else DATASETS
    get = " ".join(name for name in wanted_sets if name not in UNFETCHED)
    brings = f", and `bash scripts/get_data.sh {get}` brings what can be downloaded" if get else ""
    raise FileNotFoundError(f"missing data; {where}, says what goes where{brings}:\n  " + "\n  ".join(lines))


def _near(path: Path, users: Iterable[str]) -> str:
    """What a missing file of a user's own may have meant to name, as `did_you_mean` says it."""
    own = all(name.split("|")[0] == "custom" for name in users) and path.parent.is_dir()
    return did_you_mean(path.name, (beside.name for beside in path.parent.iterdir())) if own else ""


def _first_missing(path: Path) -> Path:
    """The path itself or the folder above it that is missing while the one above that is there."""
    while not path.parent.exists():
        path = path.parent
    return path


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
