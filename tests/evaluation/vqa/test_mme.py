"""MME: every golden of the official scorer, the two layouts of its files, and facts that need no file."""

import pytest
from vqa_trees import ASK, EXACT, golden, write_mme_release

from self1e.errors import UserError
from self1e.evaluation.vqa import mme


def test_mme_matches_official():
    facts = golden("mme")
    for item in facts["items"]:
        assert mme.clean_reply(item["prediction"]) == item["post_processed"]
        if item["parsed"] != "row skipped":
            assert mme.read_reply(item["post_processed"]) == item["parsed"]
    scores = {}
    for table in facts["tables"]:
        rows = [(item["post_processed"], item["gt"]) for item in facts["items"] if item["table"] == table]
        scores[table] = mme.table_scores(rows)["score"]
    assert scores == pytest.approx(facts["tables"], abs=EXACT)
    totals = {part: sum(scores[table] for table in tables) for part, tables in mme.TABLES.items()}
    assert totals == pytest.approx(facts["totals"], abs=EXACT)


def test_mme_replies_with_a_tab():
    scores = mme.table_scores([("yes", "Yes"), ("no\tsure", "No"), ("yes", "Yes"), ("no", "No")])
    assert (scores["acc"], scores["acc_plus"], scores["score"], scores["rows_skipped"]) == (1, 0.5, 150, 1)
    assert mme.table_scores([("a\tb", "Yes"), ("c\td", "No")])["score"] == 0


def test_mme_tables_go_before_the_release(tmp_path):
    write_mme_release(tmp_path)
    table = tmp_path / "mme" / "Your_Results" / "OCR.txt"
    table.parent.mkdir()
    table.write_text("p.jpg\tFirst?\tYes\np.jpg\tSecond?\tNo\n")
    prompts = [q.prompt for q in mme.read_questions(tmp_path) if q.record["table"] == "OCR"]
    assert prompts == [f"First? {ASK}", f"Second? {ASK}"]
    table.write_text("p.jpg\tFirst?\tYes\nq.jpg\tSecond?\tNo\n")
    with pytest.raises(UserError, match="OCR"):
        mme.read_questions(tmp_path)
