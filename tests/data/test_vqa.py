"""self1e/data/vqa.py: LLaVA-Instruct and the five question sets."""

import json

import numpy as np
import pytest
from helpers import SHARED, needs_shared
from trees import H, W, photo, questions, write_json

from self1e.data.loading import TRAINING_SETS, SampleError
from self1e.data.sets.vqa import GQA, instruction_turns

SETS = TRAINING_SETS["vqa"]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SELF1E_CACHE", str(tmp_path / "cache"))


def make(root, name, seed=0):
    return SETS[name](root, root, rows=3, seed=seed)


def test_turns():
    turns = [["human", "What is it?\n<image>"], ["gpt", "A cat!"], ["human", "Sure?"], ["gpt", "Yes"]]
    turns = [["gpt", "Hello"], *turns]
    assert instruction_turns(turns, "x") == ["<image>\nWhat is it?", "A cat!", "Sure?", "Yes"]
    for broken in [], [["gpt", "Hello"]], [["human", "a"], ["human", "b"]], [["system", "a"]]:
        with pytest.raises(SampleError, match="alternate"):
            instruction_turns(broken, "x")


def test_instructions_of_all_files(tmp_path):
    photo(tmp_path / "coco/train2017/a.jpg")
    for number in 1, 2:
        turns = [{"from": "human", "value": f"<image>\n{number}?"}, {"from": "gpt", "value": "Yes."}]
        write_json(tmp_path / f"llava_dataset/{number}.json", [{"id": "r", "image": "a.jpg", "conversations": turns}])
    data = make(tmp_path, "llava_instruct_150k")
    samples = [data.sample(i, np.random.default_rng(0)) for i in range(2)]
    assert [sample.conversations for sample in samples] == [[[f"<image>\n{n}?", "Yes."]] for n in (1, 2)]
    assert samples[0].masks[0].shape == (0, H, W) and samples[0].id == "llava_instruct_150k/r"


@pytest.mark.parametrize("name", [name for name in SETS if name != "llava_instruct_150k"])
def test_question_sets(tmp_path, name):
    questions(tmp_path, SETS[name].file, 2)
    data = make(tmp_path, name)
    sample = data.sample(1, np.random.default_rng(0))
    unanswerable = " When the provided information is insufficient, respond with 'Unanswerable'."
    instruction = (unanswerable if name == "vizwiz" else "") + " Answer the question using a single word or phrase."
    assert sample.conversations == [[f"<image>\nWhat 1?{instruction}", "1"]]
    assert sample.masks[0].shape == (0, H, W) and len(data) == 2
    assert {path.name for path in SETS[name].paths(tmp_path, tmp_path)} >= {"photos"}


def test_questions_are_capped_by_the_seed(tmp_path, monkeypatch):
    monkeypatch.setattr(GQA, "cap", 4)
    questions(tmp_path, GQA.file, 12)
    chosen = [make(tmp_path, "gqa", seed).items.tolist() for seed in (1, 1, 2)]
    assert chosen[0] == chosen[1] != chosen[2] and len(set(chosen[0])) == 4


def test_a_broken_line_and_an_empty_file_name_the_source(tmp_path):
    (tmp_path / "gqa").mkdir()
    (tmp_path / GQA.file).write_text('{"image": "a.jpg", "question": "b"}\n{oops\n')
    with pytest.raises(ValueError, match="train_balanced.jsonl, line 2"):
        make(tmp_path, "gqa")
    (tmp_path / GQA.file).write_text("")
    with pytest.raises(ValueError, match="gqa: no training samples"):
        make(tmp_path, "gqa")


@needs_shared
def test_counts_equal_the_published_loaders():
    golden = json.loads((SHARED / "golden" / "val_splits.json").read_text())["_counts"]
    counts = golden["VQADataset|llava_instruct_150k"]
    data = SETS["llava_instruct_150k"](SHARED / "minidata/dataset", SHARED / "minidata/data", rows=3, seed=0)
    rows = [data.sample(i, np.random.default_rng(0)).conversations[0] for i in range(len(data))]
    assert len(data) == counts["items"]
    assert sum(len(row) // 2 for row in rows) == counts["assistant_turns"]
    raw = [turns for table in data._tables for _, _, turns in table]
    assert sum(any("!" in text for _, text in turns) for turns in raw) == counts["with_exclamation"]
    assert sum(turns[0][0] == "gpt" for turns in raw) == counts["gpt_first"]
    assert all(row[0].startswith("<image>\n") and "<image>" not in "".join(row)[1:] for row in rows)
