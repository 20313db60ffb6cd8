"""GQA: every golden of the official evaluator, and facts that need no file."""

import json

import pytest
from vqa_trees import golden

from self1e.errors import UserError
from self1e.evaluation.vqa import gqa


def test_gqa_matches_official():
    facts = golden("gqa")
    predictions = {item["questionId"]: gqa.read_prediction(item["prediction"]) for item in facts["items"]}
    for item in facts["items"]:
        assert predictions[item["questionId"]] == item["converted_prediction"]
        assert float(item["converted_prediction"] == item["answer"]) == item["score"]
    scores = gqa.accuracy(predictions, {i["questionId"]: i | {"isBalanced": True} for i in facts["items"]})
    assert {key: round(scores[key], 2) for key in facts["overall_printed_percent"]} == facts["overall_printed_percent"]


def test_what_the_official_file_lacks_is_named(tmp_path):
    (tmp_path / "gqa").mkdir()
    path = tmp_path / "gqa/testdev_balanced_questions.json"
    path.write_text(json.dumps({"7": {"isBalanced": True, "types": {}, "answer": "no"}}))
    with pytest.raises(UserError, match=f"{path}: record 1 has no structural"):
        gqa.score([], tmp_path)
