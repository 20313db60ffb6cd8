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
    columns = ([item[name] for item in items] for name in ("prediction", "answers", "answer_type"))
    scores = open_ended.vqa_accuracy(*columns, ["x"] * len(items))
    for key, expected in facts["overall"].items():
        assert scores[key] == pytest.approx(expected, abs=EXACT), key
    assert scores["vqa_official_per_question_type_percent"] == {"x": scores["vqa_official_overall_percent"]}


@pytest.mark.parametrize(
    "text, eval_script, official",
    [
        ("The 2,500 Dogs.", "2500 dogs", "2500 dogs"),
        ("yes,no", "yesno", "yes no"),
        ("None", "0", "0"),
        ("dont", "don't", "don't"),
        ("couldnt've couldn'tve couldntve", "couldn't've couldn't've couldntve", "couldn't've couldn't've couldntve"),
        ("somebody'd", "somebodyd", "somebodyd"),
        ("it's 3.5", "it 's 3.5", "it's 3.5"),
        ("1,000 a-b", "1000 b", "1000 ab"),
        (". " * 33, ".", "."),  # only the first 32 full stops go
    ],
)
def test_normaliser_rules(text, eval_script, official):
    assert open_ended.normalise_answer(text) == eval_script
    assert open_ended.normalise_answer_official(text) == official


def test_vqa_credit_grows_with_agreement():
    for agreeing, score in enumerate([0, 0.3, 0.6, 0.9, 1.0, 1.0]):
        references = ["cat"] * agreeing + [f"other {i}" for i in range(10 - agreeing)]
        assert open_ended.vqa_score("cat", references) == pytest.approx(score, abs=EXACT)
        assert open_ended.vqa_score_official("cat", references) == pytest.approx(score, abs=EXACT)


def test_the_two_vqa_scorers_differ_when_all_references_agree():
    assert open_ended.vqa_score("YES", TEN_YES) == 1
    assert open_ended.vqa_score_official("YES", TEN_YES) == 0
    assert open_ended.vqa_score_official("YES", TEN_YES[1:] + ["no"]) == 1
