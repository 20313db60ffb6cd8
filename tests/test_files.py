"""Files appear complete or not at all; folders for results are tried before the work."""

import json

import pytest

from self1e.errors import UserError
from self1e.files import check_utf8, check_writable, read_json, read_records, replacing, to_jsonl, write_text


def test_a_failed_write_leaves_the_old_file(tmp_path):
    write_text(tmp_path / "new" / "f.txt", "old")
    with pytest.raises(RuntimeError), replacing(tmp_path / "new" / "f.txt") as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["f.txt"]
    assert (tmp_path / "new" / "f.txt").read_text() == "old"


def test_a_failed_folder_leaves_the_old_one(tmp_path):
    with replacing(tmp_path / "model", folder=True) as folder:
        (folder / "weights").write_text("old")
    with pytest.raises(RuntimeError), replacing(tmp_path / "model", folder=True) as folder:
        (folder / "weights").write_text("new")
        raise RuntimeError
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert (tmp_path / "model" / "weights").read_text() == "old"


def test_a_folder_is_tried_and_nothing_is_left_in_it(tmp_path):
    check_writable(tmp_path / "new" / "newer")
    assert [path.name for path in tmp_path.rglob("*")] == ["new", "newer"]


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file" / "sub", tmp_path / "file", tmp_path / ("n" * 300)):
        with pytest.raises(UserError, match=f"{folder}: cannot be written to"):
            check_writable(folder)


@pytest.mark.parametrize("content", [None, "{", "[1]"])
def test_a_json_file_that_is_none_is_named(tmp_path, content):
    if content is not None:
        (tmp_path / "a.json").write_text(content)
    with pytest.raises(UserError, match=r"a\.json (cannot be read|is missing)"):
        read_json(tmp_path / "a.json", dict)


def test_a_line_that_was_torn_within_a_letter_is_left_out(tmp_path):
    (tmp_path / "a.jsonl").write_bytes('{"a": "é"}\n{"a": "é'.encode()[:-1])
    assert [*read_records(tmp_path / "a.jsonl")] == [{"a": "é"}] and not [*read_records(tmp_path / "absent")]


def test_names_that_are_no_utf_8_are_written_and_read():
    record = {"image": "caf\udce9.jpg", "prompt": "é"}
    assert json.loads(to_jsonl([record]).encode()) == record and "é" in to_jsonl([record])
    check_utf8("café")
    with pytest.raises(UserError, match="not UTF-8"):
        check_utf8("caf\udce9")
