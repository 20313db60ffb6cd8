"""MMBench: every golden of VLMEvalKit's exact matching, and facts that need no file."""

import pandas as pd
import pytest
from vqa_trees import EXACT, golden

from self1e.evaluation.vqa import mmbench


@pytest.mark.parametrize("column, suffix", [("post_processed", "post_processed"), ("raw_prediction", "raw")])
def test_mmbench_matches_official(column, suffix):
    facts = golden("mmbench_dev")
    table = pd.DataFrame(facts["items"])
    for item in facts["items"]:
        prediction = mmbench.read_prediction(item["raw_prediction"], mmbench.options_of(item))
        assert prediction == item["post_processed"]
    table["prediction"] = table[column]
    choices = mmbench.read_choices(table[["index", "A", "B", "C", "D", "prediction"]])
    assert choices == [item[f"inferred_{suffix}"] or None for item in facts["items"]]
    assert [int(c == a) for c, a in zip(choices, table["answer"])] == list(table[f"hit_plain_{suffix}"])
    scores = mmbench.accuracy(table)
    for kind, expected in facts["scores"][column].items():
        assert scores[kind]["dev"] == pytest.approx(expected, abs=EXACT), kind
    main = [item for item in facts["items"] if item["index"] < mmbench.CIRCULAR_STEP]
    for item in main:  # the circular score of one question alone
        rotations = table[table["index"] % mmbench.CIRCULAR_STEP == item["index"]]
        assert mmbench.accuracy(rotations)["circular"]["dev"]["Overall"] == item[f"hit_circular_{suffix}"]


def test_mmbench_empty_replies_stay_empty():
    for case in golden("mmbench_dev")["post_process_edge_cases"]:  # the reference stops with IndexError
        assert mmbench.read_prediction(case["raw_prediction"], {"A": "a", "B": "b"}) == ""


def test_mmbench_scores_need_every_rotation():
    rows = [
        {"index": index, "A": "up", "B": "down", "C": None, "D": None, "answer": answer, "prediction": prediction,
         "category": "c", "l2-category": "logic_reasoning", "split": "dev"}
        for index, answer, prediction in [(1, "A", "A"), (1000001, "B", "A"), (2, "A", "A"), (1000002, "B", "\x00B")]
    ]  # fmt: skip
    scores = mmbench.accuracy(pd.DataFrame(rows))
    assert scores["circular"]["dev"] == {"Overall": 0.5, "LR": 0.5, "c": 0.5}
    assert scores["plain_all_rows"]["dev"]["Overall"] == 0.75
    assert scores["plain_main_rows_only"]["dev"]["Overall"] == 1
