"""GQA: every golden of the official evaluator, and facts that need no file."""

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


def test_gqa_keeps_white_space_and_names_a_missing_prediction():
    assert gqa.read_prediction("Cat...") == "cat" and gqa.read_prediction("cat. ") == "cat. "
    question = {"answer": "cat", "isBalanced": True, "types": {"structural": "query"}}
    scores = gqa.accuracy({"1": "cat", "9": "x"}, {"1": question, "2": question | {"isBalanced": False}})
    assert (scores["accuracy"], scores["open"], scores["binary"], scores["n_binary"]) == (100, 100, 0, 0)
    with pytest.raises(UserError, match="7"):
        gqa.accuracy({}, {"7": question})
