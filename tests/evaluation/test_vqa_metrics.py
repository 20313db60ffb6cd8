"""Scores of replies: every golden of the official evaluators, and facts that need no file."""

import json

import pandas as pd
import pytest
from helpers import SHARED, needs_shared

from self1e.evaluation.vqa import metrics

EXACT = 1e-9  # sums of tenths in float64
TEN_YES = ["yes"] * 10


def golden(name: str) -> dict:
    return json.loads((SHARED / "golden" / "vqa_metrics" / f"{name}.json").read_text(encoding="utf-8"))


@needs_shared
def test_normalisers_match_official():
    items = golden("normaliser")["items"]
    wrong = [i for i in items if metrics.normalise_answer(i["input"]) != i["eval_script"]]
    wrong += [i for i in items if metrics.normalise_answer_official(i["input"]) != i["vqa_official"]]
    assert len(items) > 0 and wrong == []


@needs_shared
@pytest.mark.parametrize("name", ["vqav2", "okvqa", "textvqa", "vizwiz"])
def test_vqa_accuracy_matches_official(name):
    facts = golden(name)
    items = facts["items"]
    for item in items:
        assert metrics.normalise_answer(item["prediction"]) == item["normalised_prediction"]
        assert metrics.vqa_score(item["prediction"], item["answers"]) == pytest.approx(item["score"], abs=EXACT)
        official = round(100 * metrics.vqa_score_official(item["prediction"], item["answers"]), 2)
        assert official == pytest.approx(item["score_vqa_official_percent"], abs=EXACT), item
    columns = ([item[name] for item in items] for name in ("prediction", "answers", "answer_type"))
    scores = metrics.vqa_accuracy(*columns, ["x"] * len(items))
    for key, expected in facts["overall"].items():
        assert scores[key] == pytest.approx(expected, abs=EXACT), key
    assert scores["vqa_official_per_question_type_percent"] == {"x": scores["vqa_official_overall_percent"]}


@needs_shared
def test_gqa_matches_official():
    facts = golden("gqa")
    predictions = {item["questionId"]: metrics.gqa_prediction(item["prediction"]) for item in facts["items"]}
    for item in facts["items"]:
        assert predictions[item["questionId"]] == item["converted_prediction"]
        assert float(item["converted_prediction"] == item["answer"]) == item["score"]
    scores = metrics.gqa_accuracy(predictions, {i["questionId"]: i | {"isBalanced": True} for i in facts["items"]})
    assert {key: round(scores[key], 2) for key in facts["overall_printed_percent"]} == facts["overall_printed_percent"]


@needs_shared
def test_pope_matches_official():
    facts = golden("pope")
    f1 = []
    for category, expected in facts["categories"].items():
        items = [item for item in facts["items"] if item["category"] == category]
        answers = [metrics.pope_answer(item["prediction"]) for item in items]
        assert answers == [item["parsed"] for item in items]
        scores = metrics.pope_scores(answers, [item["label"] for item in items])
        assert scores == pytest.approx(expected, abs=EXACT)
        f1.append(scores["f1"])
    assert round(100 * metrics.mean(f1), 2) == facts["overall_f1_printed_percent"]


@needs_shared
def test_mme_matches_official():
    facts = golden("mme")
    for item in facts["items"]:
        assert metrics.mme_reply(item["prediction"]) == item["post_processed"]
        if item["parsed"] != "row skipped":
            assert metrics.mme_answer(item["post_processed"]) == item["parsed"]
    scores = {}
    for table in facts["tables"]:
        rows = [(item["post_processed"], item["gt"]) for item in facts["items"] if item["table"] == table]
        scores[table] = metrics.mme_table_scores(rows)["score"]
    assert scores == pytest.approx(facts["tables"], abs=EXACT)
    totals = {part: sum(scores[table] for table in tables) for part, tables in metrics.MME_TABLES.items()}
    assert totals == pytest.approx(facts["totals"], abs=EXACT)


@needs_shared
@pytest.mark.parametrize("column, suffix", [("post_processed", "post_processed"), ("raw_prediction", "raw")])
def test_mmbench_matches_official(column, suffix):
    facts = golden("mmbench_dev")
    table = pd.DataFrame(facts["items"])
    for item in facts["items"]:
        prediction = metrics.mmbench_prediction(item["raw_prediction"], metrics.mmbench_options(item))
        assert prediction == item["post_processed"]
    table["prediction"] = table[column]
    choices = metrics.mmbench_choices(table[["index", "A", "B", "C", "D", "prediction"]])
    assert choices == [item[f"inferred_{suffix}"] or None for item in facts["items"]]
    assert [int(c == a) for c, a in zip(choices, table["answer"])] == list(table[f"hit_plain_{suffix}"])
    scores = metrics.mmbench_scores(table)
    for kind, expected in facts["scores"][column].items():
        assert scores[kind]["dev"] == pytest.approx(expected, abs=EXACT), kind
    main = [item for item in facts["items"] if item["index"] < metrics.CIRCULAR_STEP]
    for item in main:  # the circular score of one question alone
        rotations = table[table["index"] % metrics.CIRCULAR_STEP == item["index"]]
        assert metrics.mmbench_scores(rotations)["circular"]["dev"]["Overall"] == item[f"hit_circular_{suffix}"]


@needs_shared
def test_mmbench_empty_replies_stay_empty():
    for case in golden("mmbench_dev")["post_process_edge_cases"]:  # the reference stops with IndexError
        assert metrics.mmbench_prediction(case["raw_prediction"], {"A": "a", "B": "b"}) == ""


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
    assert metrics.normalise_answer(text) == eval_script
    assert metrics.normalise_answer_official(text) == official


def test_vqa_credit_grows_with_agreement():
    for agreeing, score in enumerate([0, 0.3, 0.6, 0.9, 1.0, 1.0]):
        references = ["cat"] * agreeing + [f"other {i}" for i in range(10 - agreeing)]
        assert metrics.vqa_score("cat", references) == pytest.approx(score, abs=EXACT)
        assert metrics.vqa_score_official("cat", references) == pytest.approx(score, abs=EXACT)


def test_the_two_vqa_scorers_differ_when_all_references_agree():
    assert metrics.vqa_score("YES", TEN_YES) == 1
    assert metrics.vqa_score_official("YES", TEN_YES) == 0
    assert metrics.vqa_score_official("YES", TEN_YES[1:] + ["no"]) == 1


def test_gqa_keeps_white_space_and_names_a_missing_prediction():
    assert metrics.gqa_prediction("Cat...") == "cat" and metrics.gqa_prediction("cat. ") == "cat. "
    question = {"answer": "cat", "isBalanced": True, "types": {"structural": "query"}}
    scores = metrics.gqa_accuracy({"1": "cat", "9": "x"}, {"1": question, "2": question | {"isBalanced": False}})
    assert (scores["accuracy"], scores["open"], scores["binary"], scores["n_binary"]) == (100, 100, 0, 0)
    with pytest.raises(ValueError, match="7"):
        metrics.gqa_accuracy({}, {"7": question})


def test_pope_zero_denominators_are_zero():
    scores = metrics.pope_scores(["no", "no"], ["no", "no"])
    assert (scores["accuracy"], scores["precision"], scores["recall"], scores["f1"]) == (1, 0, 0, 0)
    with pytest.raises(ValueError):
        metrics.pope_scores(["yes"], ["yes", "no"])


def test_mme_tab_and_odd_rows():
    scores = metrics.mme_table_scores([("yes", "Yes"), ("no\tsure", "No"), ("yes", "Yes"), ("no", "No")])
    assert (scores["acc"], scores["acc_plus"], scores["score"], scores["rows_skipped"]) == (1, 0.5, 150, 1)
    assert metrics.mme_table_scores([("a\tb", "Yes"), ("c\td", "No")])["score"] == 0
    with pytest.raises(ValueError, match="odd"):
        metrics.mme_table_scores([("yes", "Yes")])


@pytest.mark.parametrize(
    "prediction, choice",
    [
        ("B", "B"),
        ("(C).", "C"),
        ("A or B", None),
        ("A is what one would say after a long look", None),
        ("It is b: the correct answer is **b", "B"),
        ("Cannot determine the answer: A", "Z"),
        ("Z", "Z"),
        ("a small DOG", "C"),
        ("dog or cat", None),
        ("E", None),
    ],
)
def test_mmbench_choice_rules(prediction, choice):
    options = {"A": "horse and cart", "B": "cat", "C": "dog", "D": "bird"}
    assert metrics.mmbench_choice(prediction, options) == choice


def test_mmbench_scores_need_every_rotation():
    rows = [
        {"index": index, "A": "up", "B": "down", "C": None, "D": None, "answer": answer, "prediction": prediction,
         "category": "c", "l2-category": "logic_reasoning", "split": "dev"}
        for index, answer, prediction in [(1, "A", "A"), (1000001, "B", "A"), (2, "A", "A"), (1000002, "B", "\x00B")]
    ]  # fmt: skip
    scores = metrics.mmbench_scores(pd.DataFrame(rows))
    assert scores["circular"]["dev"] == {"Overall": 0.5, "LR": 0.5, "c": 0.5}
    assert scores["plain_all_rows"]["dev"]["Overall"] == 0.75
    assert scores["plain_main_rows_only"]["dev"]["Overall"] == 1
