"""Files appear complete or not at all."""

import pytest

from self1e.files import write_text


def test_failed_write_leaves_the_old_file(tmp_path):
    write_text(tmp_path / "new" / "f.txt", "old")
    with pytest.raises(UnicodeEncodeError):
        write_text(tmp_path / "new" / "f.txt", "\ud800")
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["f.txt"]
    assert (tmp_path / "new" / "f.txt").read_text() == "old"
