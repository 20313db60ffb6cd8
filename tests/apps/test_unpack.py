"""Archives from the web: what is wanted comes out whole, and nothing leaves its place."""

import io
import stat
import struct
import tarfile
import zipfile
from pathlib import Path

import pytest

from self1e.apps.unpack import check_format, unpack


def make_zip(path: Path, members: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return path


def make_tar(path: Path, members: dict[str, bytes | tarfile.TarInfo], mode: str = "w") -> Path:
    with tarfile.open(path, mode) as archive:
        for name, content in members.items():
            record = content if isinstance(content, tarfile.TarInfo) else tarfile.TarInfo(name)
            if isinstance(content, bytes):
                record.size = len(content)
            archive.addfile(record, io.BytesIO(content) if isinstance(content, bytes) else None)
    return path


def special(name: str, kind: bytes, target: str = "") -> tarfile.TarInfo:
    record = tarfile.TarInfo(name)
    record.type, record.linkname = kind, target
    return record


def tree(folder: Path) -> dict[str, bytes]:
    """Everything below a folder, links not followed."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


MEMBERS = {
    "top/train/a.jpg": b"a",
    "top/train/deep/b.jpg": b"b",
    "top/val/c.jpg": b"c",
    "__MACOSX/train/._a.jpg": b"x",
}


@pytest.mark.parametrize("kind", ["zip", "tar", "tar.gz"])
def test_folder_comes_out_from_below_leading_folders(tmp_path, kind):
    archive = tmp_path / f"x.{kind}"
    make_zip(archive, MEMBERS) if kind == "zip" else make_tar(archive, MEMBERS, "w:gz" if kind == "tar.gz" else "w")
    check_format(archive, archive.name)
    unpack(archive, {"train": tmp_path / "tree/photos", "c.jpg": tmp_path / "tree/one.jpg"})
    assert tree(tmp_path / "tree") == {"photos/a.jpg": b"a", "photos/deep/b.jpg": b"b", "one.jpg": b"c"}


def test_what_exists_stays_as_it_is(tmp_path):
    (tmp_path / "tree/photos").mkdir(parents=True)
    (tmp_path / "tree/photos/mine.jpg").write_bytes(b"mine")
    unpack(make_zip(tmp_path / "x.zip", MEMBERS), {"train": tmp_path / "tree/photos", "val": tmp_path / "tree/val"})
    assert tree(tmp_path / "tree") == {"photos/mine.jpg": b"mine", "val/c.jpg": b"c"}


def test_rest_of_an_interrupted_run_is_cleared(tmp_path):
    (tmp_path / ".photos.unpacking").mkdir()
    (tmp_path / ".photos.unpacking/half.jpg").write_bytes(b"h")
    unpack(make_zip(tmp_path / "x.zip", MEMBERS), {"train": tmp_path / "photos"})
    assert tree(tmp_path / "photos") == {"a.jpg": b"a", "deep/b.jpg": b"b"}


def refused(archive: Path, message: str, wanted: str = "train") -> None:
    """Unpacking fails, and leaves nothing anywhere."""
    before = tree(archive.parent)
    with pytest.raises(ValueError, match=message):
        unpack(archive, {wanted: archive.parent / "tree/photos"})
    assert tree(archive.parent) == before


@pytest.mark.parametrize(
    "name", ["../evil", "train/../../evil", "/evil", "C:\\evil", "..\\evil", "train/..\\..\\evil"]
)
@pytest.mark.parametrize("make", [make_zip, make_tar])
def test_member_that_leads_out_of_the_folder(tmp_path, name, make):
    refused(make(tmp_path / "x.zip", {"train/a.jpg": b"a", name: b"evil"}), "leads out of the archive's folder")


@pytest.mark.parametrize(
    "record",
    [
        special("train/l", tarfile.SYMTYPE, "/etc/passwd"),
        special("train/l", tarfile.LNKTYPE, "train/a.jpg"),
        special("train/l", tarfile.CHRTYPE),
        special("train/l", tarfile.FIFOTYPE),
    ],
    ids=["symbolic link", "hard link", "device", "pipe"],
)
def test_links_and_devices_in_tar(tmp_path, record):
    refused(make_tar(tmp_path / "x.tar", {"train/a.jpg": b"a", record.name: record}), "is a link or a device")


def test_link_in_zip(tmp_path):
    record = zipfile.ZipInfo("train/l")
    record.create_system, record.external_attr = 3, (stat.S_IFLNK | 0o777) << 16
    archive = make_zip(tmp_path / "x.zip", {"train/a.jpg": b"a"})
    with zipfile.ZipFile(archive, "a") as file:
        file.writestr(record, "/etc/passwd")
    refused(archive, "is a link or a device")


def test_bomb(tmp_path):
    bomb = make_zip(tmp_path / "x.zip", {"train/a.jpg": bytes(70 << 20)}, zipfile.ZIP_DEFLATED)
    refused(bomb, "would take 70.0 MB, more than 100 times the 6")


def test_member_larger_than_declared(tmp_path):
    """The table of contents says 10 bytes: no more are written, and the sum no longer fits."""
    archive = make_zip(tmp_path / "x.zip", {"train/a.jpg": bytes(100_000)}, zipfile.ZIP_DEFLATED)
    content = bytearray(archive.read_bytes())
    start = content.rindex(b"PK\1\2") + 24
    content[start : start + 4] = struct.pack("<I", 10)
    archive.write_bytes(content)
    refused(archive, "damaged")


def test_flipped_bit_in_zip(tmp_path):
    archive = make_zip(tmp_path / "x.zip", {"train/a.jpg": b"photo" * 100})
    archive.write_bytes(archive.read_bytes().replace(b"photophoto", b"photoPhoto", 1))
    refused(archive, "damaged: Bad CRC-32")


@pytest.mark.parametrize("mode", ["w", "w:gz"])
def test_cut_tar(tmp_path, mode):
    archive = make_tar(tmp_path / "x.tar", {"train/a.jpg": bytes(range(256)) * 400}, mode)
    archive.write_bytes(archive.read_bytes()[: archive.stat().st_size // 2])
    refused(archive, "damaged")


def test_repeated_member(tmp_path):
    with pytest.warns(UserWarning, match="Duplicate"), zipfile.ZipFile(tmp_path / "x.zip", "w") as file:
        file.writestr("train/a.jpg", b"a")
        file.writestr("train/a.jpg", b"b")
    refused(tmp_path / "x.zip", "holds 'train/a.jpg' 2 times")


def test_missing_and_ambiguous_members(tmp_path):
    refused(make_zip(tmp_path / "x.zip", MEMBERS), "it holds no test but __MACOSX, top", "test")
    refused(make_zip(tmp_path / "y.zip", {"a/train/1": b"", "b/train/2": b""}), "several train: in a, b")


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("x.zip", b"<!DOCTYPE html>", "a web page"),
        ("x.json", b"\n <html>", "a web page"),
        ("x.jsonl", b"PK\3\4", "something else"),
        ("x.tsv", b"<html>", "a web page"),
        ("x.tar.gz", b"\x1f\x8b cut", "something else"),
        ("x.json", b"", "cut"),
        ("x.jsonl", b'{"a": 1}\n{"a": ', "cut"),
    ],
)
def test_file_of_another_format(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        check_format(tmp_path / name, name)
