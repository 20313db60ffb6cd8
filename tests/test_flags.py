"""Folders for results are tried before the work, also while other processes make them."""

import threading

import pytest

from self1e.flags import check_writable


def test_a_folder_is_tried_and_left_as_it_was(tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "kept.json").write_text("{}")
    before = sorted(tmp_path.rglob("*"))
    for folder in (tmp_path / "full", tmp_path / "new" / "newer", tmp_path):
        check_writable(folder)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "nowhere").symlink_to(tmp_path / "gone" / "away")
    for folder in (tmp_path / "file" / "sub", tmp_path / "file", tmp_path / "nowhere", tmp_path / ("n" * 300)):
        with pytest.raises(OSError, match=f"{folder}: cannot be written to .*choose another folder"):
            check_writable(folder)


def test_another_process_may_make_the_folder_meanwhile(tmp_path):
    """The second rank of an evaluation writes its first file in the run's folder while the first rank tries it."""
    runs = [tmp_path / "runs" / str(number) for number in range(300)]
    together = threading.Barrier(2)

    def other() -> None:
        for run in runs:
            together.wait(timeout=60)
            (run / ".ranks").mkdir(parents=True)

    rank = threading.Thread(target=other)
    rank.start()
    try:
        for run in runs:
            together.wait(timeout=60)
            check_writable(run)
    finally:
        together.abort()
        rank.join()
    assert all((run / ".ranks").is_dir() for run in runs)
