"""Downloads from a server that cuts, lies, ignores and redirects: the file is whole under its name, or not there."""

import hashlib
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from webserver import Page, serve

from self1e.apps import download as module
from self1e.apps.download import CHUNK, Address, DownloadError, Unavailable, download, open_session, part_path
from self1e.apps.unpack import check_format

CONTENT = np.random.default_rng(0).bytes(300_000)
CUT = 2 * CHUNK
SHA256 = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture(scope="module", autouse=True)
def no_pause():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "PAUSE", 0)
        yield


@pytest.fixture
def site():
    with serve() as site:
        yield site


def get(site, page: Page, target: Path, *, known: dict | None = None, **options) -> bytes:
    """Download `page`; returns what bears the target's name afterwards."""
    site["file"] = page
    download(Address(site.url("file"), **(known or {})), target, session=open_session(), **options)
    return target.read_bytes()


@pytest.mark.parametrize(
    "page",
    [
        Page(CONTENT),
        Page(CONTENT, cuts=[CUT, 1]),
        Page(CONTENT, cuts=[CUT], ranges="no"),
        Page(CONTENT, cuts=[CUT], ranges="wrong"),
        Page(CONTENT, busy=2),
        Page(CONTENT, packed=True),
        Page(CONTENT, packed=True, cuts=[CUT]),
    ],
    ids=["well", "cut twice", "cut, ignores Range", "cut, sends another range", "busy", "packed", "packed and cut"],
)
def test_file_arrives_whole(site, tmp_path, page):
    known = {"bytes": len(CONTENT), "sha256": SHA256, "md5": hashlib.md5(CONTENT).hexdigest()}
    assert get(site, page, tmp_path / "file", known=known) == CONTENT
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_cut_download_asks_for_the_rest_only(site, tmp_path):
    get(site, Page(CONTENT, cuts=[CUT]), tmp_path / "file")
    assert site.requests == [("file", None), ("file", f"bytes={CUT}-")]


def test_later_run_continues_and_starts_again_when_the_file_changed(site, tmp_path):
    target = tmp_path / "file"
    cuts = [CUT] + [0] * 5
    with pytest.raises(
        DownloadError, match="file: the connection broke .5 attempts.; 128.0 KB are kept, run the same command again"
    ):
        get(site, Page(CONTENT, cuts=cuts.copy()), target)
    assert not target.exists()
    assert get(site, Page(CONTENT), target) == CONTENT
    assert site.requests[-1] == ("file", f"bytes={CUT}-")
    target.unlink()
    with pytest.raises(DownloadError):
        get(site, Page(CONTENT, cuts=cuts.copy()), target)
    assert get(site, Page(CONTENT[::-1], etag='"2"'), target) == CONTENT[::-1]


def test_whole_part_needs_no_request(site, tmp_path):
    address = Address(site.url("file"), bytes=len(CONTENT), sha256=SHA256)
    part_path(address, tmp_path / "file").write_bytes(CONTENT)
    download(address, tmp_path / "file", session=open_session())
    assert (tmp_path / "file").read_bytes() == CONTENT and site.requests == []


def test_part_longer_than_the_file_starts_again(site, tmp_path):
    part_path(Address(site.url("file")), tmp_path / "file").write_bytes(CONTENT + b"more")
    assert get(site, Page(CONTENT), tmp_path / "file") == CONTENT


def test_announced_longer_than_it_is(site, tmp_path):
    with pytest.raises(DownloadError, match="are kept"):
        get(site, Page(CONTENT, announce=len(CONTENT) + 5), tmp_path / "file")
    assert not (tmp_path / "file").exists()


def test_announced_shorter_than_it_is(site, tmp_path):
    short = len(CONTENT) - 5
    with pytest.raises(Unavailable, match=f"announces {short:,} bytes where {len(CONTENT):,} are expected"):
        get(site, Page(CONTENT, announce=short), tmp_path / "file", known={"bytes": len(CONTENT)})
    with pytest.raises(Unavailable, match="sha256 is"):
        get(site, Page(CONTENT, announce=short), tmp_path / "file", known={"sha256": SHA256})
    zip_check = {"check": lambda path: check_format(path, "file.zip")}
    with pytest.raises(Unavailable, match="no whole zip file.*was deleted"):
        get(site, Page(CONTENT, announce=short), tmp_path / "file", **zip_check)
    assert not (tmp_path / "file").exists()


def test_other_sum_is_refused_and_can_be_accepted(site, tmp_path):
    with pytest.raises(Unavailable, match="--accept_changed") as error:
        get(site, Page(CONTENT), tmp_path / "file", known={"sha256": "0" * 64})
    part = Path(re.search(r"delete (\S+) to", str(error.value))[1])
    assert part.read_bytes() == CONTENT and not (tmp_path / "file").exists()
    assert get(site, Page(CONTENT), tmp_path / "file", known={"sha256": "0" * 64}, accept_changed=True) == CONTENT


@pytest.mark.parametrize(
    "page, message",
    [
        (Page(status=404), "answers 404"),
        (Page(status=403), "answers 403"),
        (Page(busy=99), "answers 503"),
        (Page(b"<html>", kind="text/html; charset=utf-8"), "a web page instead of the file"),
        (Page(redirect="/file"), "redirects"),
        (Page(redirect="ftp://example.org/file"), "No connection adapters"),
        (Page(CONTENT, cuts=[0] * 9), "5 attempts"),
    ],
)
def test_address_without_the_file(site, tmp_path, page, message):
    with pytest.raises(Unavailable, match=message) as error:
        get(site, page, tmp_path / "file")
    assert site.url("file") in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "file").exists()


def test_nobody_answers(tmp_path):
    with pytest.raises(Unavailable, match="refused"):
        download(Address("http://127.0.0.1:9/file"), tmp_path / "file", session=open_session())


def test_redirect_is_followed(site, tmp_path):
    site["moved"] = Page(CONTENT, cuts=[CUT])
    assert get(site, Page(redirect="/moved"), tmp_path / "file") == CONTENT


def test_full_disk_is_seen_before_the_transfer(site, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(DownloadError, match="needs 293.0 KB and the disk of .* has 1000 B free; make room"):
        get(site, Page(CONTENT), tmp_path / "file")
    assert not (tmp_path / "file").exists()
