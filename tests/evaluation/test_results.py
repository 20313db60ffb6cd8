"""Results on disk survive interruptions, and those of other settings or data are never continued."""

import os
import shutil

import pytest

from self1e.errors import UserError
from self1e.evaluation import results as module
from self1e.evaluation.results import Results, claim_folder, code_hash, make_settings
from self1e.files import read_json, to_jsonl

ASKED = {n: {"text": f"sentence {n}"} for n in range(4)}
RECORDS = [{"id": n, "text": f"sentence {n}", "I": n} for n in range(4)]


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_what_ranks_wrote_is_continued_and_finished(tmp_path, monkeypatch):
    results = Results(tmp_path, "own[1]", ASKED)
    results.open(overwrite=False)
    assert results.found == {}
    for rank in (0, 1):
        monkeypatch.setattr(module.distributed, "rank", lambda rank=rank: rank)
        Results(tmp_path, "own[1]", ASKED).append({rank: {"I": rank}})
    torn = tmp_path / "own[1].rank1.jsonl"
    torn.write_text(torn.read_text() + '{"id": 2, "te')
    monkeypatch.setattr(module.distributed, "rank", lambda: 0)
    results = Results(tmp_path, "own[1]", ASKED)
    results.open(overwrite=False)
    assert results.found == {0: RECORDS[0], 1: RECORDS[1]}
    assert names(tmp_path) == ["own[1].rank0.jsonl"]
    results.append({3: {"I": 3}, 2: {"I": 2}})  # behind a whole line
    assert results.finish() == RECORDS
    assert names(tmp_path) == ["own[1].jsonl"] and results.path.read_text() == to_jsonl(RECORDS)
    results.open(overwrite=False)
    assert len(results.found) == 4 and names(tmp_path) == ["own[1].jsonl"]
    Results(tmp_path, "own[12]", ASKED).append({0: {"I": 0}})  # another split's
    results.open(overwrite=True)
    assert results.found == {}
    assert set(names(tmp_path)) == {"own[1].rank0.jsonl", "own[12].rank0.jsonl"}


@pytest.mark.parametrize("line", ['{"id": 9}', '{"id": 1, "text": "another sentence"}'])
def test_results_of_other_data_are_refused(tmp_path, line):
    (tmp_path / "a.jsonl").write_text(f"{to_jsonl(RECORDS[:1])}{line}\n")
    with pytest.raises(UserError, match=r"a\.jsonl holds .*--overwrite_eval"):
        Results(tmp_path, "a", ASKED).open(overwrite=False)


def test_a_folder_holds_results_of_one_setting(tmp_path):
    settings = make_settings({"weights": "w1", "base": None}, precision="float32")
    before = make_settings({"weights": "w0", "base": None}, precision="float32")
    claim_folder(tmp_path / "eval", before, overwrite=False)
    (tmp_path / "eval/a.jsonl").touch()  # of a run that ended before its first result, which is none
    claim_folder(tmp_path / "eval", settings, overwrite=False)
    for stem in ("a", "b"):
        (tmp_path / f"eval/{stem}.jsonl").write_text("{}\n")
        (tmp_path / f"eval/{stem}.json").write_text("{}")
    claim_folder(tmp_path / "eval", settings, overwrite=False)
    claim_folder(tmp_path / "eval", settings, overwrite=True)  # whose splits are taken anew one by one
    assert len(names(tmp_path / "eval")) == 5
    other = make_settings({"weights": "w2", "base": None}, precision="bfloat16")
    with pytest.raises(UserError, match="weights was 'w1' and is 'w2', precision was 'float32'.*--overwrite_eval"):
        claim_folder(tmp_path / "eval", other, overwrite=False)
    claim_folder(tmp_path / "eval", other, overwrite=True)
    assert names(tmp_path / "eval") == ["settings.json"]
    assert read_json(tmp_path / "eval/settings.json", dict)["weights"] == "w2"


def test_edited_code_is_another_setting(tmp_path, monkeypatch):
    for room in module.DECIDING:
        shutil.copytree(module.PACKAGE / room, tmp_path / room, ignore=shutil.ignore_patterns("__pycache__"))
    before = code_hash()
    monkeypatch.setattr(module, "PACKAGE", tmp_path)
    assert code_hash() == before
    with open(tmp_path / "model" / "head.py", "a") as file:
        file.write(os.linesep)
    assert code_hash() != before
