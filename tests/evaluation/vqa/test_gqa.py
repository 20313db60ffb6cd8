"""GQA: every golden of the official evaluator, and facts that need no file."""

from vqa_trees import golden

from self1e.evaluation.vqa import gqa


def test_gqa_matches_official():
    facts = golden("gqa")
    predictions = {item["questionId"]: gqa.read_prediction(item["prediction"]) for item in facts["items"]}
    for item in facts["items"]:
        assert predictions[item["questionId"]] == item["converted_prediction"]
        assert float(item["converted_prediction"] == item["answer"]) == item["score"]
    scores = gqa.accuracy(predictions, {i["questionId"]: i | {"isBalanced": True} for i in facts["items"]})
    assert {key: round(scores[key], 2) for key in facts["overall_printed_percent"]} == facts["overall_printed_percent"]
