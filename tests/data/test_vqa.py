"""self1e/data/sets/vqa.py: LLaVA-Instruct and the five question sets."""

import json
import shutil

import numpy as np
import pytest
from helpers import SHARED, needs_shared
from trees import H, W, photo, questions, write_json

from self1e.data.families import FAMILIES, select
from self1e.data.mixture import Mixture
from self1e.data.sets.vqa import QUESTIONS
from self1e.errors import UserError

SETS = FAMILIES["vqa"]


def make(root, name):
    return SETS[name](name, root, root).opened()


def test_turns(tmp_path):
    photo(tmp_path / "coco/train2017/a.jpg")
    turns = [["human", "What is it?\n<image>"], ["gpt", "A cat!"], ["human", "Sure?"], ["gpt", "Yes"]]
    broken = [], [["gpt", "Hello"]], [["human", "a"], ["human", "b"]], [["system", "a"]]
    records = [
        {"id": k, "image": "a.jpg", "conversations": [{"from": name, "value": text} for name, text in each]}
        for k, each in enumerate([[["gpt", "Hello"], *turns], *broken])
    ]
    write_json(tmp_path / "llava_dataset/llava_instruct_150k.json", records)
    data = make(tmp_path, "llava_instruct_150k")
    assert data.turns(0) == ["<image>\nWhat is it?", "A cat!", "Sure?", "Yes"]
    for k in range(1, 5):
        with pytest.raises(UserError, match="alternate"):
            data.turns(k)


def test_instructions_come_from_one_file_alone(tmp_path):
    photo(tmp_path / "coco/train2017/a.jpg")
    for name in "llava_instruct_150k", "conversation_58k":  # the second is a part of the first
        turns = [{"from": "human", "value": f"<image>\n{name}?"}, {"from": "gpt", "value": "Yes."}]
        write_json(tmp_path / f"llava_dataset/{name}.json", [{"id": "r", "image": "a.jpg", "conversations": turns}])
    data = make(tmp_path, "llava_instruct_150k")
    sample = data.sample(0, np.random.default_rng(0))
    assert len(data) == 1 and sample.conversations == [["<image>\nllava_instruct_150k?", "Yes."]]
    assert sample.masks[0].shape == (0, H, W) and sample.id == "llava_instruct_150k/0"


@pytest.mark.parametrize("name", QUESTIONS)
def test_question_sets(tmp_path, name):
    questions(tmp_path, QUESTIONS[name], 2)
    data = make(tmp_path, name)
    sample = data.sample(1, np.random.default_rng(0))
    unanswerable = " When the provided information is insufficient, respond with 'Unanswerable'."
    instruction = (unanswerable if name == "vizwiz" else "") + " Answer the question using a single word or phrase."
    assert sample.conversations == [[f"<image>\nWhat 1?{instruction}", "1"]]
    assert sample.masks[0].shape == (0, H, W) and len(data) == 2
    shutil.rmtree(tmp_path / "photos")
    with pytest.raises(UserError, match="photos are missing: .*photos"):
        make(tmp_path, name)


def test_a_broken_line_and_an_empty_file_name_the_source(tmp_path):
    (tmp_path / "gqa").mkdir()
    (tmp_path / QUESTIONS["gqa"]).write_text('{"image": "a.jpg", "question": "b"}\n{oops\n')
    with pytest.raises(UserError, match="train_balanced.jsonl: line 2"):
        make(tmp_path, "gqa")
    (tmp_path / QUESTIONS["gqa"]).write_text("")
    with pytest.raises(UserError, match="gqa: no training samples"):
        selection = select(dataset="vqa", vqa_data="gqa", dataset_dir=tmp_path, data_dir=tmp_path)
        Mixture(selection, batch_size=1, seed=0)


@needs_shared
def test_counts_equal_the_published_loaders():
    golden = json.loads((SHARED / "golden" / "val_splits.json").read_text())["_counts"]
    counts = golden["VQADataset|llava_instruct_150k"]
    data = SETS["llava_instruct_150k"]("llava_instruct_150k", SHARED / "minidata/dataset").opened()
    rows = [data.sample(i, np.random.default_rng(0)).conversations[0] for i in range(len(data))]
    assert len(data) == counts["items"]
    assert sum(len(row) // 2 for row in rows) == counts["assistant_turns"]
    raw = [turns for _, turns in data.records]
    assert sum(any("!" in text for _, text in turns) for turns in raw) == counts["with_exclamation"]
    assert sum(turns[0][0] == "gpt" for turns in raw) == counts["gpt_first"]
    assert all(row[0].startswith("<image>\n") and "<image>" not in "".join(row)[1:] for row in rows)
