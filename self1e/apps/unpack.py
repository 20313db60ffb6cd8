"""Take named members out of zip and tar archives from the web, into places that do not exist yet.

Nothing is written before the whole table of contents has been found harmless: no member outside the archive's own
folder, no link or device among those taken, no size beyond reason. What is taken appears under its name when all of it
is there.
"""

import gzip
import os
import shutil
import tarfile
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import IO

from tqdm import tqdm

from self1e.apps.download import human, require_space

MOST_EXPANSION = 100  # times the archive's size that its members may have; text compresses about tenfold
ALWAYS_FINE = 64 << 20  # bytes of members that need no such check
# RuntimeError: a zip with a password, or packed by an unknown method
DAMAGED = (EOFError, zlib.error, gzip.BadGzipFile, zipfile.BadZipFile, tarfile.TarError, RuntimeError)


@dataclass(frozen=True, eq=False)
class Member:
    """A file in an archive: its name and declared size in bytes, whether it is an ordinary file, how to read it."""

    name: str
    size: int
    ordinary: bool
    open: Callable[[], IO[bytes]]

    @property
    def parts(self) -> tuple[str, ...]:
        return PurePosixPath(self.name).parts

    @property
    def is_noise(self) -> bool:
        """Whether it is what a Mac adds to archives, or nothing."""
        return not self.parts or "__MACOSX" in self.parts or self.parts[-1].startswith(("._", ".DS_Store"))


def is_archive(name: str) -> bool:
    """Whether a file of this name is unpacked rather than put in its place."""
    return name.endswith((".zip", ".tar", ".tar.gz"))


def check_format(path: Path, name: str) -> None:
    """Raises ValueError where the file at `path` is not what `name` promises: an archive, JSON, or a table."""
    with open(path, "rb") as file:
        start = file.read(512).lstrip(b"\xef\xbb\xbf \r\n\t")
        file.seek(max(0, file.seek(0, os.SEEK_END) - 512))
        end = file.read().rstrip()
    if name.endswith(".zip"):
        fits = zipfile.is_zipfile(path)
    elif name.endswith((".tar", ".tar.gz")):
        try:
            fits = tarfile.is_tarfile(path)
        except DAMAGED:  # only TarError counts as no tar there
            fits = False
    elif name.endswith((".json", ".jsonl")):
        fits = start[:1] in (b"{", b"[") and end[-1:] in (b"}", b"]")
    else:
        fits = b"\t" in start
    if not fits:
        found = "a web page" if start[:1] == b"<" else f"cut or something else (it starts with {start[:16]!r})"
        raise ValueError(f"it is no whole {name.rsplit('.', 1)[-1]} file but {found}")


def unpack(archive: Path, places: dict[str, Path]) -> None:
    """Take members out of an archive. A place that exists already is left as it is.

    places: path of a file or folder in the archive, with or without its leading folders -> where it goes
    Raises ValueError where the archive is damaged, lacks a member or is not safe to unpack, and DownloadError where
    the disk is too small.
    """
    places = {wanted: place for wanted, place in places.items() if not place.exists()}
    if not places:
        return
    staged = {place: place.with_name(f".{place.name}.unpacking") for place in places.values()}
    try:
        with open_archive(archive) as members:
            chosen = {place: locate(members, wanted) for wanted, place in places.items()}
            taken = [member for found in chosen.values() for member, _ in found]
            check_safety(members, taken, size=archive.stat().st_size)
            total = sum(member.size for member in taken)
            for place, stage in staged.items():
                require_space(place.parent, total, f"unpacking {archive.name}")
                remove(stage)
            targets = {member: staged[place].joinpath(*below) for place in chosen for member, below in chosen[place]}
            with tqdm(total=total, desc=f"unpacking {archive.name}"[:40], unit="B", unit_scale=True) as bar:
                for member in members:  # in the archive's order, which a compressed tar must be read in
                    if member in targets:
                        copy(member, targets[member], bar)
        if hasattr(os, "sync"):
            os.sync()  # once, instead of for each of a hundred thousand photos
        for place, stage in staged.items():
            stage.rename(place)
    except DAMAGED as error:
        raise ValueError(f"it is damaged: {error}") from error
    finally:
        for stage in staged.values():
            remove(stage)


def remove(path: Path) -> None:
    """Delete what an interrupted run left."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


@contextmanager
def open_archive(path: Path) -> Iterator[list[Member]]:
    """The members of an archive, folders left out; they can be opened within the block."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as zipped:
            records = [record for record in zipped.infolist() if not record.is_dir()]
            yield [Member(r.filename, r.file_size, is_regular(r), partial(zipped.open, r)) for r in records]
    else:
        with tarfile.open(path) as tarred:
            bar = tqdm(tarred, desc=f"reading {path.name}"[:40], unit="member")
            yield [Member(r.name, r.size, r.isreg(), partial(opened, tarred, r)) for r in bar if not r.isdir()]


def opened(archive: tarfile.TarFile, record: tarfile.TarInfo) -> IO[bytes]:
    """A regular file of a tar archive for reading."""
    file = archive.extractfile(record)
    assert file is not None, record.name  # links and devices are refused before
    return file


def is_regular(record: zipfile.ZipInfo) -> bool:
    """Whether a member of a zip made on Unix is an ordinary file; those made elsewhere always are."""
    return record.external_attr >> 16 & 0o170000 in (0, 0o100000)


def copy(member: Member, target: Path, bar: tqdm) -> None:
    """Write a member to a file that does not exist yet. Raises EOFError where it is shorter than declared."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with member.open() as source, open(target, "xb") as file:
        while chunk := source.read(1 << 20):
            file.write(chunk)
            bar.update(len(chunk))
    if target.stat().st_size != member.size:
        raise EOFError(f"{member.name} ends after {target.stat().st_size:,} of {member.size:,} bytes")


def locate(members: list[Member], wanted: str) -> list[tuple[Member, tuple[str, ...]]]:
    """(member, path below `wanted`) of the file or folder `wanted`, wherever it lies; the outermost one counts.

    Raises ValueError where it is missing, or several lie equally deep.
    """
    sought = PurePosixPath(wanted).parts
    found: dict[tuple[str, ...], list[tuple[Member, tuple[str, ...]]]] = {}
    for member in members:
        parts = member.parts
        starts = range(0 if member.is_noise else len(parts) - len(sought) + 1)
        start = next((start for start in starts if parts[start : start + len(sought)] == sought), None)
        if start is not None:
            found.setdefault(parts[:start], []).append((member, parts[start + len(sought) :]))
    if not found:
        tops = sorted({member.parts[0] for member in members if member.parts})
        raise ValueError(f"it holds no {wanted} but {', '.join(tops[:5]) or 'nothing'}{' ...' if tops[5:] else ''}")
    depth = min(map(len, found))
    outermost = [prefix for prefix in found if len(prefix) == depth]
    if len(outermost) > 1:
        raise ValueError(f"it holds several {wanted}: in {', '.join('/'.join(prefix) for prefix in outermost)}")
    return found[outermost[0]]


def check_safety(members: list[Member], taken: list[Member], *, size: int) -> None:
    """Raises ValueError for names that leave the archive's folder, links, devices, repeated names, and zip bombs.

    size: bytes of the archive
    """
    for member in members:
        windows = PureWindowsPath(member.name)  # knows both kinds of slashes, and drives
        if ".." in windows.parts or windows.anchor:
            raise ValueError(f"its member {member.name!r} leads out of the archive's folder; nothing was unpacked")
    for member in taken:
        if not member.ordinary:
            raise ValueError(f"its member {member.name!r} is a link or a device; nothing was unpacked")
    names = Counter(member.name.casefold() for member in taken)
    name, times = names.most_common(1)[0]
    if times > 1:
        raise ValueError(f"it holds {name!r} {times} times; nothing was unpacked")
    total = sum(member.size for member in taken)
    if total > max(ALWAYS_FINE, MOST_EXPANSION * size):
        raise ValueError(
            f"its members would take {human(total)}, more than {MOST_EXPANSION} times the {human(size)} of the "
            "archive; nothing was unpacked"
        )
