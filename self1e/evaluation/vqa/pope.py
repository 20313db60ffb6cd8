"""POPE: is the object in the photo? Yes or no, in three categories of absent objects."""

from collections.abc import Sequence
from pathlib import Path

from self1e.errors import UserError
from self1e.evaluation.vqa.base import Answer, Question, Scores, VQABenchmark, mean, ratio, read_jsonl
from self1e.files import write_json


def read_reply(reply: str) -> str:
    """`no` when `No`, `no` or `not` stands as a word (split at blanks, commas deleted) before the first full stop.

    Everything else is `yes`, as in the official reading: also an empty reply, `NO`, `no!` and `None`.
    """
    words = reply.split(".")[0].replace(",", "").split(" ")
    return "no" if {"No", "no", "not"} & set(words) else "yes"


def category_scores(answers: Sequence[str], labels: Sequence[str]) -> dict:
    """Scores of one POPE category; `yes` is the positive class, `answers` and `labels` (yes/no) pair by position."""
    pairs = list(zip(answers, labels, strict=True))
    tp, fp = pairs.count(("yes", "yes")), pairs.count(("yes", "no"))
    fn, tn = pairs.count(("no", "yes")), pairs.count(("no", "no"))
    precision, recall = ratio(tp, tp + fp), ratio(tp, tp + fn)
    return {
        "samples": len(pairs), "TP": tp, "FP": fp, "TN": tn, "FN": fn,
        "accuracy": ratio(tp + tn, len(pairs)),
        "precision": precision,
        "recall": recall,
        "f1": ratio(2 * precision * recall, precision + recall),
        "yes_ratio": ratio(tp + fp, len(pairs)),
    }  # fmt: skip


CATEGORIES = ("random", "popular", "adversarial")


def read_questions(data_dir: Path) -> list[Question]:
    """`text` of each line is the prompt as it stands; photos lie in `pope/val2014`."""
    path = data_dir / "pope" / "llava_pope_test.jsonl"
    records, photos = read_jsonl(path, "question_id", "image", "text", "category"), data_dir / "pope" / "val2014"
    return [Question(r["question_id"], photos / r["image"], r["text"], r) for r in records]


def score(answers: list[Answer], data_dir: Path) -> Scores:
    """Scores per category, and overall as the mean of the categories (official for F1).

    Quirk kept: replies pair with label lines by position inside their category, not by id.
    """
    categories = {}
    for category in CATEGORIES:
        asked = [answer for answer in answers if answer.question.record["category"] == category]
        path = data_dir / "pope" / "coco" / f"coco_pope_{category}.json"
        labels = read_jsonl(path, "label")
        if len(labels) != len(asked):
            raise UserError(f"{path}: {len(labels)} labels for {len(asked)} {category} questions")
        replies = [read_reply(answer.reply) for answer in asked]
        categories[category] = category_scores(replies, [label["label"] for label in labels])
    names = ("f1", "accuracy", "precision", "recall", "yes_ratio")
    overall = {name: mean(scores[name] for scores in categories.values()) for name in names}
    groups = {"overall": overall, **categories}
    summary = {f"{name} ({group})": 100 * scores[name] for group, scores in groups.items() for name in names}
    printed = {"overall_f1_printed_percent": round(100 * overall["f1"], 2)}
    return Scores(summary, {"categories": categories, "overall": overall, **printed})


def export(answers: list[Answer], folder: Path) -> None:
    own = {"model_id": folder.parents[1].name, "metadata": {}}  # the run
    records = [{"question_id": q.id, "text": reply, "text_orig": reply, **own} for q, reply in answers]
    write_json(folder / "pope.json", records)


BENCHMARKS = {"pope": VQABenchmark(questions=read_questions, max_new_tokens=100, metric=score, export=export)}
