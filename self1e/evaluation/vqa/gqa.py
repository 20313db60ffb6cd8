"""GQA testdev: exact match with one answer, by the GQA evaluator's rules."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path

from self1e.errors import UserError
from self1e.evaluation.vqa.base import Answer, Scores, VQABenchmark, jsonl_questions, mean, require
from self1e.files import read_json, write_json
from self1e.model.prompts import VQA_INSTRUCTION


def read_prediction(reply: str) -> str:
    """The reply as it enters the GQA evaluator: full stops at the end dropped, then lower case, nothing else."""
    return reply.rstrip(".").lower()


def accuracy(predictions: Mapping[str, str], questions: Mapping[str, Mapping]) -> dict:
    """The GQA evaluator's accuracy in percent over all balanced questions, over open and over binary ones.

    predictions: question id -> `read_prediction` of the reply. questions: id -> record; open is what asks a `query`.
    """
    balanced = {key: question for key, question in questions.items() if question["isBalanced"]}
    missing = [key for key in balanced if key not in predictions]
    if missing:
        raise UserError(f"{len(missing)} balanced GQA questions have no prediction, the first is {missing[0]}")
    hits = {key: predictions[key] == question["answer"] for key, question in balanced.items()}
    open_hits = [hit for key, hit in hits.items() if balanced[key]["types"]["structural"] == "query"]
    binary_hits = [hit for key, hit in hits.items() if balanced[key]["types"]["structural"] != "query"]
    parts = {"accuracy": hits.values(), "open": open_hits, "binary": binary_hits}
    counts = {"n": len(hits), "n_open": len(open_hits), "n_binary": len(binary_hits)}
    return counts | {name: 100 * mean(part) for name, part in parts.items()}


def _predictions(answers: list[Answer]) -> dict[str, str]:
    return {str(answer.question.id): read_prediction(answer.reply) for answer in answers}


def score(answers: list[Answer], data_dir: Path) -> Scores:
    """Exact match on the balanced testdev questions; their file goes by either of two names."""
    paths = [data_dir / "gqa" / f"testdev_balanced_{name}.json" for name in ("questions", "all_questions")]
    path = next(filter(Path.is_file, paths), paths[0])
    questions = read_json(path, dict)
    require(path, questions.values(), "isBalanced", "types", "answer")
    require(path, (question["types"] for question in questions.values()), "structural")
    details = accuracy(_predictions(answers), questions)
    return Scores({name: details[name] for name in ("accuracy", "open", "binary")}, details)


def export(answers: list[Answer], folder: Path) -> None:
    records = [
        {"question": q.prompt, "questionId": q.id, "answer": reply, "annotation": q.record.get("answer")}
        for q, reply in answers
    ]
    write_json(folder / "gqa_testdev_llava.json", records)
    predictions = [{"questionId": key, "prediction": text} for key, text in _predictions(answers).items()]
    write_json(folder / "testdev_balanced_predictions.json", predictions)


_ASKED = partial(jsonl_questions, file="gqa/llava_gqa_testdev_balanced_qwen_format.jsonl", instruction=VQA_INSTRUCTION)
BENCHMARKS = {"vqa-gqa-testdev": VQABenchmark(questions=_ASKED, max_new_tokens=10, metric=score, export=export)}
