"""Records survive interruptions: torn lines, several ranks' files, another number of ranks."""

import pytest

from self1e.evaluation.journal import Journal
from self1e.files import to_jsonl


def records(journal: Journal) -> list[int]:
    return [record["n"] for _, record in journal.read()]


def test_what_ranks_wrote_is_read_joined_and_finished(tmp_path, monkeypatch):
    journal = Journal(tmp_path / "deep" / "own[1].jsonl")
    assert records(journal) == []
    for rank in (0, 1):
        monkeypatch.setenv("RANK", str(rank))
        journal.append([{"n": rank}, {"n": rank + 10}])
    torn = tmp_path / "deep" / "own[1].rank1.jsonl"
    torn.write_text(torn.read_text() + '{"n": 3, "te')
    assert records(journal) == [0, 10, 1, 11]
    journal.start({"n": n} for n in (0, 1))
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["own[1].rank0.jsonl"]
    monkeypatch.setenv("RANK", "0")
    journal.append([{"n": 2}])  # behind a whole line
    assert records(journal) == [0, 1, 2]
    journal.finish(record for _, record in list(journal.read()))
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["own[1].jsonl"]
    assert journal.path.read_text() == to_jsonl({"n": n} for n in range(3))


def test_start_anew_drops_everything(tmp_path):
    journal = Journal(tmp_path / "a.jsonl")
    journal.finish([{"n": 1}])
    journal.append([{"n": 2}])
    Journal(tmp_path / "ab.jsonl").append([{"n": 9}])  # another split's
    journal.start([])
    assert [path.name for path in tmp_path.iterdir()] == ["ab.rank0.jsonl"]


@pytest.mark.parametrize("line", ["{", "[1]", "\0\0"])
def test_a_broken_line_before_the_last_is_named(tmp_path, line):
    (tmp_path / "a.jsonl").write_text(f'{{"n": 1}}\n{line}\n{{"n": 2}}\n')
    with pytest.raises(ValueError, match=r"a\.jsonl, line 2.*--overwrite_eval"):
        records(Journal(tmp_path / "a.jsonl"))
