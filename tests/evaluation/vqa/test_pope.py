"""POPE: every golden of the official evaluator, and facts that need no file."""

import pytest
from vqa_trees import EXACT, golden

from self1e.evaluation.vqa import pope
from self1e.evaluation.vqa.base import mean


def test_pope_matches_official():
    facts = golden("pope")
    f1 = []
    for category, expected in facts["categories"].items():
        items = [item for item in facts["items"] if item["category"] == category]
        answers = [pope.read_reply(item["prediction"]) for item in items]
        assert answers == [item["parsed"] for item in items]
        scores = pope.category_scores(answers, [item["label"] for item in items])
        assert scores == pytest.approx(expected, abs=EXACT)
        f1.append(scores["f1"])
    assert round(100 * mean(f1), 2) == facts["overall_f1_printed_percent"]
