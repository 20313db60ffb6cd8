"""GQA: every golden of the official evaluator, and facts that need no file."""

import pytest
from vqa_trees import golden

from self1e.errors import UserError
from self1e.evaluation.vqa import gqa
from self1e.files import write_json


def test_gqa_matches_official():
    facts = golden("gqa")
    predictions = {item["questionId"]: gqa.read_prediction(item["prediction"]) for item in facts["items"]}
    for item in facts["items"]:
        assert predictions[item["questionId"]] == item["converted_prediction"]
        assert float(item["converted_prediction"] == item["answer"]) == item["score"]
    scores = gqa.accuracy(predictions, {i["questionId"]: i | {"isBalanced": True} for i in facts["items"]})
    assert {key: round(scores[key], 2) for key in facts["overall_printed_percent"]} == facts["overall_printed_percent"]


@pytest.mark.parametrize("types", [{}, None, ["query"]])
def test_a_record_without_its_structure_is_named(tmp_path, types):
    path = tmp_path / "gqa/testdev_balanced_questions.json"
    write_json(path, {"1": {"isBalanced": True, "types": types, "answer": "yes"}})
    with pytest.raises(UserError, match="record 1 has no structural"):
        gqa.score([], tmp_path)
