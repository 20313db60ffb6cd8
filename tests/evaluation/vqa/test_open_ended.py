"""VQAv2, OK-VQA, TextVQA, VizWiz: the goldens of both official evaluators, and facts that need no file."""

import pytest
from vqa_trees import EXACT, golden

from self1e.evaluation.vqa import open_ended

TEN_YES = ["yes"] * 10


def test_normalisers_match_official():
    items = golden("normaliser")["items"]
    wrong = [i for i in items if open_ended.normalise_answer(i["input"]) != i["eval_script"]]
    wrong += [i for i in items if open_ended.normalise_answer_official(i["input"]) != i["vqa_official"]]
    assert len(items) > 0 and wrong == []


@pytest.mark.parametrize("name", ["vqav2", "okvqa", "textvqa", "vizwiz"])
def test_vqa_accuracy_matches_official(name):
    facts = golden(name)
    items = facts["items"]
    for item in items:
        assert open_ended.normalise_answer(item["prediction"]) == item["normalised_prediction"]
        assert open_ended.vqa_score(item["prediction"], item["answers"]) == pytest.approx(item["score"], abs=EXACT)
        official = round(100 * open_ended.vqa_score_official(item["prediction"], item["answers"]), 2)
        assert official == pytest.approx(item["score_vqa_official_percent"], abs=EXACT), item
    entries = [
        {"answers": [{"answer": x} for x in item["answers"]], "answer_type": item["answer_type"]} for item in items
    ]
    scores = open_ended.vqa_accuracy([item["prediction"] for item in items], entries)
    for key, expected in facts["overall"].items():
        assert scores[key] == pytest.approx(expected, abs=EXACT), key
    assert scores["vqa_official_per_question_type_percent"] == {"none": scores["vqa_official_overall_percent"]}


def test_the_two_vqa_scorers_differ_when_all_references_agree():
    assert open_ended.vqa_score("YES", TEN_YES) == 1
    assert open_ended.vqa_score_official("YES", TEN_YES) == 0
    assert open_ended.vqa_score_official("YES", TEN_YES[1:] + ["no"]) == 1
